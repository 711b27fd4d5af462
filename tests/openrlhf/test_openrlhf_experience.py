"""α on OpenRLHF's advantages, for batches worked out by hand: its own method, and the wrapper around it."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("openrlhf.cli", reason="OpenRLHF is not installed (make test-openrlhf)")

import openrlhf_harness as harness
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

from hpo_plugin.algorithm import RewardError
from hpo_plugin.errors import ConfigError
from hpo_plugin.openrlhf.experience import compute_advantages_and_returns
from hpo_plugin.variants import resolve

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def arguments():
    changes = {"rollout.n_samples_per_prompt": 4, "train.batch_size": 32}
    return harness.parse(harness.REQUIRED + harness.words(harness.OPTIONS | changes))


@pytest.fixture
def weighted(arguments):
    """Advantages of the responses' tokens, and ``info``, in the order of the rewards."""

    def run(rewards, *, lengths=None, order=None, group=4, policy="ahpo", settings=None, **changes):
        args = SimpleNamespace(**vars(arguments))
        args.rollout = SimpleNamespace(
            **(vars(arguments.rollout) | {"n_samples_per_prompt": group, "max_new_tokens": 5})
        )
        args.reward = SimpleNamespace(**(vars(arguments.reward) | changes))
        variant, values = resolve(policy, settings or {})
        args.hpo = SimpleNamespace(variant=variant, settings=values)
        maker = RemoteExperienceMaker(
            None, None, None, None, SimpleNamespace(value=0.0), SimpleNamespace(args=args), None
        )
        order = order or list(range(len(rewards)))
        lengths = torch.tensor(lengths or [3] * len(rewards))
        experiences = []
        for rows in (order[i : i + 2] for i in range(0, len(order), 2)):
            mask = torch.zeros(2, 7, dtype=torch.long)
            mask[:, 2:] = torch.arange(5) < lengths[rows].unsqueeze(1)
            experiences.append(
                Experience(
                    index=rows,
                    action_mask=mask,
                    rewards=torch.tensor(rewards)[rows],
                    response_length=lengths[rows],
                    kl=torch.zeros(2, 7),
                    info={},
                )
            )
        found = compute_advantages_and_returns(maker.compute_advantages_and_returns, maker, (experiences,), {})
        advantages = torch.empty(len(rewards), 7)
        for experience in found:
            advantages[experience.index] = experience.advantages
            assert not experience.advantages[experience.action_mask == 0].any()
        values, _ = advantages.abs().max(dim=1)
        return (values * advantages.sum(dim=1).sign()).tolist(), found[0].info

    return run


def test_a_batch_by_hand(weighted):
    """1 of 4 and 2 of 4: 3 positive and 5 negative advantages, in micro-batches of any rows."""
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    plain = [1.5, -0.5, -0.5, -0.5] + [0.866] * 2 + [-0.866] * 2
    found, info = weighted(rewards, lengths=[1, 2, 3, 4, 5, 1, 2, 2], order=[6, 1, 4, 0, 7, 2, 5, 3])
    assert found == pytest.approx([a if a > 0 else 0.6 * a for a in plain], rel=1e-3)
    assert info["hpo/alpha"].tolist() == pytest.approx([3 / 5] * 2)
    assert info["hpo/share_positive"][0] == 3 / 8
    assert info["hpo/response_length"][0] == 20 / 8
    found, info = weighted(rewards, policy="hpo", settings={"alpha": 0.25})
    assert found == pytest.approx([a if a > 0 else 0.25 * a for a in plain], rel=1e-3)


def test_rounding_is_no_sign(weighted):
    """Eight rewards of 0.1 have advantages of −7.45 in OpenRLHF; they are zero here, and not counted."""
    found, info = weighted([0.1] * 8 + [1.0] + [0.0] * 7, group=8)
    assert found[:8] == [0.0] * 8
    assert info["hpo/alpha"][0] == pytest.approx(1 / 7)
    assert info["hpo/share_degenerate_groups"][0] == 0.5


def test_a_reward_that_equals_the_mean_of_its_group_has_no_sign(weighted):
    """The fp32 mean is not 0.4, which six of eight have; with their sign, α would be 1/7."""
    found, info = weighted([0.1, 0.7] + [0.4] * 6, group=8)
    assert found[2:] == [0.0] * 6
    assert info["hpo/alpha"][0] == 1.0


def test_rewards_are_those_after_length_penalties(weighted):
    """Equal rewards, of which the longest response loses a part: its advantage is the negative one."""
    found, info = weighted(
        [1.0] * 4, lengths=[2, 2, 2, 5], overlong_buffer_len=2, policy="hpo", settings={"alpha": 0.5}
    )
    assert found == pytest.approx([0.5] * 3 + [-0.75], rel=1e-3)
    assert info["hpo/share_degenerate_groups"][0] == 0


def test_a_response_without_a_token_is_not_counted(weighted):
    """OpenRLHF keeps it in the mean of its group."""
    found, info = weighted([1.0, 0.0, 0.0, 0.0], lengths=[3, 3, 3, 0])
    assert found == pytest.approx([1.5, -0.25, -0.25, 0.0])
    assert info["hpo/alpha"][0] == pytest.approx(1 / 2)
    assert info["hpo/share_positive"][0] == pytest.approx(1 / 3)
    assert info["hpo/share_negative"][0] == pytest.approx(2 / 3)
    assert info["hpo/response_length"][0] == 3


def test_groups_are_those_that_openrlhf_normalizes(weighted):
    """Three equal rewards have a sign because of a response without a token; a group of such responses is no group."""
    found, info = weighted([1.0, 1.0, 1.0, 0.0] + [0.0] * 4, lengths=[3, 3, 3, 0] + [0] * 4)
    assert found == pytest.approx([0.5] * 3 + [0.0] * 5)
    assert info["hpo/share_degenerate_groups"][0] == 0


def test_an_infinite_reward_stops_the_run_and_the_error_has_its_place_in_the_rollout_batch(weighted):
    with pytest.raises(RewardError, match="inf") as error:
        weighted([0.0, 0.0, math.inf, 0.0], order=[3, 2, 0, 1])
    assert error.value.rows == [2]
    # It is in the mean of its group.
    with pytest.raises(RewardError, match="nan"):
        weighted([0.0, 0.0, math.nan, 0.0], lengths=[3, 3, 0, 3])


def test_the_worker_checks_the_arguments_too(weighted):
    with pytest.raises(ConfigError, match=r"--reward\.clip_range"):
        weighted([1.0, 0.0, 0.0, 0.0], clip_range=(0.0, 1.0))


def test_openrlhf_has_the_bug_of_the_report():
    text = (ROOT / "contrib" / "openrlhf" / "group_norm.md").read_text(encoding="utf-8")
    script, output = (
        re.search(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1] for kind in ("python", "text")
    )
    # The path has the stand-ins of these tests.
    path = [f"import sys; sys.path += {[str(Path(__file__).with_name('stand_ins'))]}\n"]
    done = subprocess.run([sys.executable, "-c", "".join([*path, script])], capture_output=True, text=True, check=False)
    assert done.stdout == output, f"OpenRLHF no longer has the bug? Then remove the report.\n{done.stderr}"
