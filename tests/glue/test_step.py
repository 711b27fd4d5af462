"""What is counted over a whole step, with ranks simulated by a list: ``all_gather`` is a function of the caller's."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from verl.trainer.ppo import core_algos

from hpo_plugin.algorithm import adaptive_alpha, count_signs, response_signs
from hpo_plugin.glue.step import (
    GROUP_RELATIVE,
    LOSS_SUMS,
    Rows,
    Step,
    StepError,
    current_step,
    gather_step,
    use_step,
)


def rows(advantages: list[float], uids: list[str] | None, lengths: list[int] | None = None) -> Rows:
    """Outcome advantages of one rank, as verl nests and pads them."""
    lengths = lengths or [2] * len(advantages)
    mask = torch.arange(4) < torch.tensor(lengths).reshape(-1, 1)
    return Rows.of(torch.tensor(advantages).unsqueeze(-1) * mask, mask, uids)


def step_of(*ranks: Rows, **settings) -> Step:
    """The step as every rank must see it."""
    settings = {
        "adv_estimator": "grpo",
        "hysteresis": "ahpo",
        "weigh": "loss",
        "alpha": 0.6,
        "alpha_min": 0.1,
    } | settings
    steps = [gather_step(rank, all_gather=lambda _: list(ranks), **settings) for rank in ranks]
    assert all(step == steps[0] for step in steps)
    return steps[0]


def counted(step: Step) -> list[int]:
    return [int(count) for count in step.counts]


TWO_GROUPS = ([1.5, -0.5, -0.5, -0.5, 0.0, 0.0], ["a"] * 4 + ["b"] * 2, [1, 3, 2, 2, 4, 4])
"""Rewards (1, 0, 0, 0) and (0, 0): counts 1, 3 of 6, so α = 1/3; 16 tokens."""


def test_metrics_worked_out_by_hand():
    """|A| over tokens: positive 1.5 · 1; negative 0.5 · 7 · α = 7/6."""
    step = step_of(rows(*TWO_GROUPS))
    assert counted(step) == [1, 3, 6]
    assert step.metrics == pytest.approx(
        {
            "hpo/alpha": 1 / 3,
            "hpo/share_positive": 1 / 6,
            "hpo/share_negative": 3 / 6,
            "hpo/share_degenerate_groups": 1 / 2,
            "hpo/response_length": 16 / 6,
            "hpo/loss_share_positive": 1.5 / (1.5 + 7 / 6),
            "hpo/loss_share_negative": 7 / 6 / (1.5 + 7 / 6),
        }
    )


def test_rows_weighed_by_the_estimator_are_not_weighed_again_in_the_metrics():
    by_loss = step_of(rows(*TWO_GROUPS))
    advantages = [a / 3 if a < 0 else a for a in TWO_GROUPS[0]]
    by_advantage = step_of(rows(advantages, *TWO_GROUPS[1:]), adv_estimator="ahpo", weigh="advantage")
    assert by_advantage.metrics == pytest.approx(by_loss.metrics)


@pytest.mark.parametrize(("hysteresis", "weigh", "alpha"), [("hpo", "loss", 0.4), (None, None, 1.0)])
def test_alpha_is_fixed_for_hpo_and_one_without_hysteresis(hysteresis, weigh, alpha):
    step = step_of(rows(*TWO_GROUPS), hysteresis=hysteresis, weigh=weigh, alpha=0.4)
    assert (step.alpha, step.metrics["hpo/alpha"]) == (alpha, alpha)
    assert step.metrics["hpo/loss_share_negative"] == pytest.approx(3.5 * alpha / (1.5 + 3.5 * alpha))


def test_metrics_of_the_step_and_of_the_loss_hold_no_word_by_which_verl_chooses_a_reduction():
    step = step_of(rows(*TWO_GROUPS))
    step.add_loss_sums(torch.ones(len(LOSS_SUMS)))
    keys = {f"actor/{key}" for key in step.metrics | step.loss_metrics(lambda x: [x])}
    assert len(keys) == 12
    assert not [key for key in keys for word in ("min", "max", "sum", "total") if word in key]


def test_a_response_counts_by_its_unmasked_tokens_and_a_fully_masked_row_not_at_all():
    """A multi-turn mask: the second response begins with a token of the environment."""
    advantages = torch.tensor([[1.0, 1.0, 0.0], [0.0, -2.0, -2.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    batch = Rows.of(advantages, mask, ["a", "a", "pad01"])
    assert batch.uid.tolist() == ["a", "a"]
    assert batch.sign.tolist() == [1.0, -1.0]
    assert batch.advantage.tolist() == [1.0, -2.0]
    assert batch.length.tolist() == [2, 2]
    assert batch.mass.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("cuts", [[3], [1, 4], [0], [2, 2, 5]])
def test_any_number_of_ranks_gives_the_step_of_one(cuts):
    whole = step_of(rows(*TWO_GROUPS))
    bounds = [0, *cuts, 6]
    parts = [rows(*(column[a:b] for column in TWO_GROUPS)) for a, b in pairwise(bounds)]
    split = step_of(*parts)
    assert counted(split) == counted(whole)
    assert split.alpha == whole.alpha
    assert split.metrics == pytest.approx(whole.metrics)


def grpo_rows(rewards: list[float], uids: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.zeros(len(rewards), 2)
    scores[:, -1] = torch.tensor(rewards)
    mask = torch.ones(len(rewards), 2, dtype=torch.long)
    return core_algos.compute_grpo_outcome_advantage(scores, mask, np.array(uids, dtype=object))[0], mask


def test_rounding_noise_of_verls_grpo_is_not_counted():
    """Eight rewards of 0.1 get −0.0074 each. Counted, they would make α 1/11 < α_min; it is 1/3."""
    uids = ["noise"] * 8 + ["real"] * 4
    advantages, mask = grpo_rows([0.1] * 8 + [1, 0, 0, 0], uids)
    assert (advantages[:8] < 0).all()
    naive = count_signs(response_signs(advantages, mask))
    assert [int(c) for c in naive] == [1, 11, 12]
    assert adaptive_alpha(naive, 0.0).item() == pytest.approx(1 / 11)

    step = step_of(Rows.of(advantages, mask, uids))
    assert counted(step) == [1, 3, 12]
    assert step.alpha == pytest.approx(1 / 3)
    assert step.metrics["hpo/share_degenerate_groups"] == 0.5


def test_rounding_noise_of_verls_gpg_is_not_counted():
    """Eight rewards of 0.1 get −8e-9 each: 1 positive, 9 negative and α = 1/9, where it is 1."""
    scores = torch.tensor([0.1] * 8 + [1.0, 0.0]).unsqueeze(-1)
    mask = torch.ones(10, 1, dtype=torch.long)
    uids = ["noise"] * 8 + ["real"] * 2
    advantages, _ = core_algos.compute_gpg_outcome_advantage(scores, mask, np.array(uids, dtype=object))
    assert (advantages[:8] < 0).all()
    step = step_of(Rows.of(advantages, mask, uids), adv_estimator="gpg")
    assert counted(step) == [1, 1, 10]
    assert step.alpha == 1.0


@pytest.mark.parametrize(("lengths", "counts"), [((1, 3), [9, 1, 10]), ((3, 1), [1, 9, 10])])
def test_whitening_over_the_batch_gives_equal_rewards_a_real_advantage_which_counts(lengths, counts):
    """reinforce++ baseline: minus the mean over all tokens, here ∓1/20 over a standard deviation of 1/√20, is ∓0.22."""
    mask = (torch.arange(3) < torch.tensor([2] * 8 + list(lengths)).unsqueeze(-1)).long()
    scores = torch.tensor([0.5] * 8 + [1.0, 0.0]).unsqueeze(-1) * (torch.arange(3) == 0)
    uids = np.array(["equal"] * 8 + ["real"] * 2, dtype=object)
    advantages, _ = core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(scores, mask, uids)
    assert advantages[:8, 0].abs().tolist() == pytest.approx([0.2236] * 8, abs=1e-3)
    assert counted(step_of(Rows.of(advantages, mask, uids), adv_estimator="reinforce_plus_plus_baseline")) == counts


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_advantages_that_are_not_finite_are_refused_naming_their_group(reward):
    """The loss entrance sees what verl's estimator made of the rewards: the whole group is spoiled."""
    uids = ["sound"] * 2 + ["spoiled"] * 2
    advantages, mask = grpo_rows([1.0, 0.0, 1.0, reward], uids)
    ranks = [Rows.of(advantages[i : i + 2], mask[i : i + 2], uids[i : i + 2]) for i in (0, 2)]
    with pytest.raises(StepError, match=r"2 of 4 responses .* in the groups \(uid\) spoiled\."):
        step_of(*ranks)
    step_of(*ranks, hysteresis=None, weigh=None)


def test_rounding_noise_is_told_apart_when_its_group_is_split_over_ranks():
    """Each of the ranks holds one row of the noise, which alone could be a response on its own."""
    uids = ["noise"] * 8
    advantages, mask = grpo_rows([0.1] * 8, uids)
    ranks = [Rows.of(advantages[i : i + 1], mask[i : i + 1], uids[i : i + 1]) for i in range(8)]
    assert counted(step_of(*ranks)) == [0, 0, 8]
    assert step_of(*ranks).alpha == 1.0


def test_a_lone_row_keeps_its_sign_unless_it_is_zero():
    """The advantage verl's grpo gives a group of one is its reward."""
    advantages, mask = grpo_rows([1.0, -1.0, 0.0], ["a", "b", "c"])
    step = step_of(Rows.of(advantages, mask, ["a", "b", "c"]))
    assert counted(step) == [1, 1, 3]
    assert step.metrics["hpo/share_degenerate_groups"] == pytest.approx(1 / 3)


def test_signs_of_estimators_that_are_not_group_relative_all_count():
    """GAE may well give two responses of a prompt one and the same advantage."""
    assert "gae" not in GROUP_RELATIVE
    step = step_of(rows([-1.0, -1.0], ["a", "a"]), adv_estimator="gae")
    assert counted(step) == [0, 2, 2]
    assert "hpo/share_degenerate_groups" not in step.metrics


@pytest.mark.parametrize("adv_estimator", ["hpo", "ahpo", "gae"])
def test_estimators_without_rounding_noise_need_no_uids(adv_estimator):
    step = step_of(rows([1.0, -1.0, -1.0], None), adv_estimator=adv_estimator)
    assert counted(step) == [1, 2, 3]


def test_estimators_with_rounding_noise_need_uids_and_the_error_says_what_to_set():
    with pytest.raises(StepError) as refused:
        step_of(rows([1.0, -1.0], None), adv_estimator="grpo")
    assert "algorithm.adv_estimator=grpo" in str(refused.value)
    assert "algorithm.adv_estimator=ahpo" in str(refused.value)


def test_without_hysteresis_no_uids_are_asked_for():
    assert counted(step_of(rows([1.0, -1.0], None), hysteresis=None, weigh=None)) == [1, 1, 2]


def test_a_batch_without_responses_has_alpha_one_and_no_shares():
    step = step_of(rows([0.0], ["pad01"], lengths=[0]))
    assert counted(step) == [0, 0, 0]
    assert step.alpha == 1.0
    assert set(step.metrics.values()) == {0.0, 1.0}


def test_loss_metrics_are_token_means_over_micro_batches_and_ranks():
    """30 tokens in three unequal micro-batches of two ranks; verl's mean of micro-batch means would give 1/2."""
    here, there = step_of(rows(*TWO_GROUPS)), step_of(rows(*TWO_GROUPS))
    here.add_loss_sums(torch.tensor([10.0, -5.0, 2.0, 10.0, 1.0, 3.0]))
    here.add_loss_sums(torch.tensor([10.0, -5.0, 2.0, 5.0, 1.0, 0.0]))
    there.add_loss_sums(torch.tensor([10.0, -5.0, 2.0, 0.0, 1.0, 0.0]))
    sums: list[list[float]] = []
    there.loss_metrics(lambda mine: [sums.append(mine), mine][1:])
    expected = {
        "hpo/pg_loss_positive": -15 / 30,
        "hpo/pg_loss_negative": 6 / 30,
        "pg_clipfrac": 15 / 30,
        "pg_clipfrac_lower": 3 / 30,
        "ppo_kl": 3 / 30,
    }
    assert here.loss_metrics(lambda mine: [mine, *sums]) == pytest.approx(expected)


def test_a_step_whose_loss_was_not_ours_has_no_loss_metrics_but_takes_part_in_the_gathering():
    gathered = []
    assert step_of(rows(*TWO_GROUPS)).loss_metrics(lambda mine: gathered.append(mine) or [mine, None]) == {}
    assert gathered == [None]


def test_a_step_is_current_only_inside_and_does_not_nest():
    step = step_of(rows(*TWO_GROUPS))
    assert current_step() is None
    with use_step(step):
        assert current_step() is step
        with pytest.raises(StepError, match="do not nest"), use_step(step):
            pass
        assert current_step() is step
    assert current_step() is None


def test_an_update_that_fails_leaves_no_step_behind():
    with pytest.raises(RuntimeError, match="out of memory"), use_step(step_of(rows(*TWO_GROUPS))):
        raise RuntimeError("out of memory")
    assert current_step() is None
