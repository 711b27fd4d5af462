"""``HPOTrainer`` on batches worked out by hand, and beside what TRL users combine it with."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", minversion="1.10", exc_type=ImportError, reason="TRL is not installed (make test-trl)")

import trl_harness as tiny
from trl import GRPOConfig, GRPOTrainer

from hpo_plugin.algorithm import RewardError
from hpo_plugin.errors import ConfigError
from hpo_plugin.trl import HPOConfig, HPOTrainer
from hpo_plugin.trl import trainer as adapter

NAN = math.nan


@pytest.fixture
def weighted(monkeypatch):
    """The advantages that leave the trainer for those that TRL computed, and the logged metrics."""

    def run(
        rewards,
        advantages,
        *,
        lengths=None,
        tools=None,
        ratio=None,
        group=4,
        mode="train",
        weights=None,
        aggregation=None,
        trainer_class=HPOTrainer,
        **config,
    ):
        per_function = torch.tensor(rewards)
        per_function = per_function if per_function.dim() == 2 else per_function.unsqueeze(1)
        rows = len(per_function)
        args = HPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[], **config)
        trainer = object.__new__(trainer_class)
        trainer.__dict__ |= {
            "model": SimpleNamespace(training=mode == "train"),
            "args": args,
            "accelerator": SimpleNamespace(gather=lambda x: x, process_index=0),
            # The other one would not divide the batch as the test does.
            "num_generations": group if mode == "train" else 1,
            "num_generations_eval": group if mode == "eval" else 1,
            "reward_weights": torch.tensor(weights or [1.0] * per_function.shape[1]),
            "multi_objective_aggregation": aggregation or "sum_then_normalize",
            "_metrics": {mode: defaultdict(list)},
        }
        mask = torch.arange(5) < torch.tensor(lengths or [3] * rows).unsqueeze(1)
        output = {"advantages": torch.tensor(advantages), "completion_mask": mask.int()}
        if tools is not None:
            output["tool_mask"] = torch.tensor(tools).unsqueeze(1).expand(rows, 5)
        if ratio is not None:
            output["importance_sampling_ratio"] = torch.tensor(ratio).view(rows, -1)

        def generate(self, inputs):
            self._calculate_rewards()
            return output

        monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", lambda self: per_function)
        monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", generate)
        found = trainer._generate_and_score_completions([])["advantages"]
        return found.tolist(), {name: value for name, (value,) in trainer._metrics[mode].items()}

    return run


def test_a_batch_by_hand(weighted):
    """1 of 4 and 2 of 4: 3 positive and 5 negative advantages."""
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    plain = [1.5, -0.5, -0.5, -0.5, 0.87, 0.87, -0.87, -0.87]
    found, metrics = weighted(rewards, plain, lengths=[1, 2, 3, 4, 5, 1, 2, 2])
    assert found == pytest.approx([a if a > 0 else 0.6 * a for a in plain])
    assert metrics["hpo/alpha"] == pytest.approx(3 / 5)
    assert (metrics["hpo/share_positive"], metrics["hpo/share_negative"]) == (3 / 8, 5 / 8)
    assert metrics["hpo/response_length"] == 20 / 8
    found, metrics = weighted(rewards, plain, policy="hpo", alpha=0.25)
    assert found == pytest.approx([a if a > 0 else 0.25 * a for a in plain])
    assert metrics["hpo/alpha"] == 0.25


def test_rounding_is_no_sign(weighted):
    """Eight rewards of 0.1 have advantages of −7e-5 in TRL; they are zero here, and not counted."""
    found, metrics = weighted([0.1] * 4 + [1.0, 0.0, 0.0, 0.0], [-7e-5] * 4 + [1.5, -0.5, -0.5, -0.5])
    assert found[:4] == [0.0] * 4
    assert metrics["hpo/alpha"] == pytest.approx(1 / 3)


def test_a_reward_that_equals_the_mean_of_its_group_has_no_sign(weighted):
    """TRL's fp32 mean leaves −1.9e-7 on six of eight, which would make α 1/7."""
    found, metrics = weighted([0.1, 0.7] + [0.4] * 6, [-1.87, 1.87] + [-1.86e-7] * 6, group=8)
    assert found == pytest.approx([-1.87, 1.87] + [0.0] * 6)
    assert metrics["hpo/alpha"] == 1.0


def test_degenerate_groups_are_counted_from_the_rewards(weighted):
    """0.7, whose standard deviation is 6e-8 in TRL, is one of them."""
    _, metrics = weighted([0.7] * 4 + [1.0, 0.0, 0.0, 0.0], [0.0] * 4 + [1.5, -0.5, -0.5, -0.5])
    assert metrics["hpo/share_degenerate_groups"] == 0.5


def test_in_evaluation_groups_are_those_of_num_generations_eval(weighted):
    found, metrics = weighted([1.0, 0.0, 0.4, 0.4], [0.7, -0.7, 1e-7, 1e-7], group=2, mode="eval")
    assert found == pytest.approx([0.7, -0.7, 0.0, 0.0])
    assert metrics["hpo/share_degenerate_groups"] == 0.5


@pytest.mark.parametrize(
    "ratio",
    [
        pytest.param([1.0, 0.0, 1.0, 0.9], id="sequences"),
        # Completions have 3 of 5 tokens; TRL leaves 1 at the padding.
        pytest.param([[1.0] * 5, [0.0, 0.0, 0.0, 1.0, 1.0], [0.0, 1.1, 0.0, 1.0, 1.0], [0.9] * 5], id="tokens"),
    ],
)
def test_a_sequence_that_vllms_correction_rejects_is_not_counted(weighted, ratio):
    _, metrics = weighted([1.0, 0.0, 0.0, 0.0], [1.5, -0.5, -0.5, -0.5], ratio=ratio)
    assert metrics["hpo/alpha"] == pytest.approx(1 / 2)


def test_a_subclass_may_change_the_rewards(weighted):
    class Shaped(HPOTrainer):
        def _calculate_rewards(self, *arguments, **options):
            return super()._calculate_rewards(*arguments, **options) + torch.tensor([[1.0], [0.0], [0.0], [0.0]])

    found, _ = weighted([0.5] * 4, [1.5, -0.5, -0.5, -0.5], trainer_class=Shaped, policy="hpo", alpha=0.5)
    assert found == pytest.approx([1.5, -0.25, -0.25, -0.25])


def test_two_functions_whose_weighted_sum_is_equal_give_no_signal(weighted):
    rewards = [[1.0, 0.0], [0.0, 0.5], [1.0, 0.0], [0.0, 0.5]]
    found, metrics = weighted(rewards, [1e-5, -1e-5, 1e-5, -1e-5], weights=[1.0, 2.0])
    assert found == [0.0] * 4
    assert metrics["hpo/alpha"] == 1.0


def test_what_no_function_judged_is_in_no_count(weighted):
    found, metrics = weighted([0.1, 0.1, 0.1, NAN, 1.0, 0.0, 0.0, NAN], [-7e-5] * 3 + [0.0, 1.1, -0.5, -0.5, 0.0])
    assert found[:4] == [0.0] * 4
    assert metrics["hpo/alpha"] == pytest.approx(1 / 2)
    assert metrics["hpo/share_negative"] == pytest.approx(2 / 6)


def test_a_reward_that_is_nan_in_one_function_counts_with_the_others(weighted):
    found, _ = weighted([[NAN, 1.0], [0.0, 0.0], [NAN, 0.0], [0.0, 0.0]], [1.5, -0.5, -0.5, -0.5])
    assert found == pytest.approx([1.5, -0.5 / 3, -0.5 / 3, -0.5 / 3])


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_an_infinite_reward_stops_the_run(weighted, aggregation):
    with pytest.raises(RewardError, match="inf"):
        weighted([math.inf, 0.0, 0.0, 0.0], [1.5, -0.5, -0.5, -0.5], lengths=[0, 3, 3, 3], aggregation=aggregation)


@pytest.mark.parametrize("masked", ["completion", "tool"])
def test_a_completion_without_a_token_in_the_loss_is_not_counted(weighted, masked):
    """mask_truncated_completions, or a completion of tool output only; its reward stays in TRL's group."""
    masks = {"lengths": [3, 3, 3, 0]} if masked == "completion" else {"tools": [1, 1, 1, 0]}
    found, metrics = weighted([1.0, 0.0, 0.0, 0.0], [1.5, -0.5, -0.5, -0.5], **masks)
    assert metrics["hpo/alpha"] == pytest.approx(1 / 2)
    assert metrics["hpo/share_negative"] == pytest.approx(2 / 3)
    assert found[:3] == pytest.approx([1.5, -0.25, -0.25])


def test_a_signal_that_comes_from_a_masked_completion_is_kept(weighted):
    found, metrics = weighted([1.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.5, -1.5], lengths=[3, 3, 3, 0])
    assert found[:3] == [0.5] * 3
    assert metrics["hpo/alpha"] == 1.0


def test_advantages_that_are_normalized_over_the_batch_keep_those_of_equal_groups(weighted):
    found, metrics = weighted(
        [1.0] * 4 + [0.0] * 4, [1.0] * 4 + [-1.0] * 4, policy="hpo", alpha=0.5, aggregation="normalize_then_sum"
    )
    assert found == [1.0] * 4 + [-0.5] * 4
    assert metrics["hpo/share_negative"] == 0.5


def test_all_equal_or_no_negative_means_alpha_of_one(weighted):
    assert weighted([0.0] * 4, [0.0] * 4)[1]["hpo/alpha"] == 1.0


def test_a_run_that_is_observed_keeps_trls_advantages_and_logs_what_ahpo_would_use(weighted):
    """1 of 4, all of 4: 1 positive response of 1 token, 3 negative ones of 2, 3 and 4; the rounding is no sign."""
    plain = [1.5, -0.5, -0.5, -0.5, -7e-5, -7e-5, -7e-5, -7e-5]
    rewards = [1.0, 0.0, 0.0, 0.0] + [0.1] * 4
    found, metrics = weighted(rewards, plain, lengths=[1, 2, 3, 4, 5, 5, 5, 5], observe=True)
    assert found == torch.tensor(plain).tolist()
    assert metrics == pytest.approx(
        {
            "hpo/observe/alpha": 1 / 3,
            "hpo/observe/share_positive": 1 / 8,
            "hpo/observe/share_negative": 3 / 8,
            "hpo/observe/share_degenerate_groups": 1 / 2,
            "hpo/observe/response_length_positive": 1.0,
            "hpo/observe/response_length_negative": 3.0,
        }
    )
    assert weighted(rewards, plain, observe=True, alpha_min=0.5)[1]["hpo/observe/alpha"] == 0.5


def test_every_policy_logs_the_same_curves(weighted):
    for policy, alpha in (("hpo", 0.6), ("ahpo", 1 / 3)):
        _, metrics = weighted([1.0, 0.0, 0.0, 0.0], [1.5, -0.5, -0.5, -0.5], lengths=[1, 2, 3, 4], policy=policy)
        assert metrics["hpo/alpha"] == pytest.approx(alpha)
        assert metrics["hpo/observe/alpha"] == pytest.approx(1 / 3)
        assert metrics["hpo/observe/response_length_negative"] == 3.0


def test_a_completion_that_is_not_in_the_loss_is_not_observed(weighted):
    _, metrics = weighted([1.0, 0.0, 0.0, 0.0], [1.5, -0.5, -0.5, -0.5], lengths=[3, 4, 2, 0], observe=True)
    assert metrics["hpo/observe/alpha"] == pytest.approx(1 / 2)
    assert metrics["hpo/observe/response_length_negative"] == 3.0


def test_an_infinite_reward_does_not_stop_a_run_that_is_observed(weighted, caplog):
    found, metrics = weighted([math.inf, 0.0, 0.0, 0.0], [1.5, -0.5, -0.5, -0.5], observe=True)
    assert (found, metrics) == ([1.5, -0.5, -0.5, -0.5], {})
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "observe=True: skipped the metrics of a generation batch: rewards must be finite"
    )


def make(tmp_path, **given):
    """A trainer of the tiny model, from the harness' settings."""
    options = {**tiny.DEFAULTS, "max_steps": 2, "num_iterations": 1, **given.pop("options", {})}
    return HPOTrainer(
        **{
            "model": tiny.build_model(),
            "reward_funcs": tiny.reward,
            "args": HPOConfig(output_dir=str(tmp_path), **options),
            "train_dataset": tiny.prompts(),
            "processing_class": tiny.build_tokenizer(),
            **given,
        }
    )


def test_a_plain_config_is_refused():
    with pytest.raises(TypeError, match=r"args is a GRPOConfig, but HPOTrainer requires an HPOConfig"):
        HPOTrainer(tiny.build_model(), tiny.reward, GRPOConfig(output_dir="unused", use_cpu=True, bf16=False))


def test_the_default_config_is_named_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # GRPOConfig's default is bf16, which a machine without a GPU refuses.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    seen = []
    monkeypatch.setattr(GRPOTrainer, "__init__", lambda self, model, rewards, args, *more, **other: seen.append(args))
    HPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", tiny.reward)
    assert isinstance(seen[0], HPOConfig)
    assert seen[0].output_dir == "Qwen2.5-0.5B-Instruct-HPO"


def test_the_loss_of_liger_is_refused_where_it_divides_by_a_micro_batch(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "compute_liger_loss", lambda self: None, raising=False)
    args = HPOConfig(output_dir="unused", use_cpu=True, bf16=False)
    args.use_liger_kernel = True
    with pytest.raises(ConfigError, match=r"use_liger_kernel=True.*use_liger_kernel=False"):
        HPOTrainer(tiny.build_model(), tiny.reward, args)
    args.observe = True
    monkeypatch.setattr(GRPOTrainer, "__init__", lambda *arguments: None)
    HPOTrainer(tiny.build_model(), tiny.reward, args)


def test_training_and_evaluation_log_the_metrics(tmp_path):
    trainer = make(
        tmp_path,
        eval_dataset=tiny.prompts().select(range(8)),
        options={"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8},
    )
    trainer.train()
    train = [entry for entry in trainer.state.log_history if "hpo/alpha" in entry]
    assert len(train) == 2
    assert all(0 <= entry["hpo/share_degenerate_groups"] <= 1 for entry in train)
    evaluated = [entry for entry in trainer.state.log_history if "eval_hpo/alpha" in entry]
    assert len(evaluated) == 1
    assert 0.1 <= evaluated[0]["eval_hpo/alpha"] <= 1


def test_an_adapter_of_peft_learns(tmp_path):
    peft = pytest.importorskip("peft")
    trainer = make(tmp_path, peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_two_reward_functions_with_weights_train(tmp_path):
    def shorter(completions, **_):
        return [None if text == "" else -float(len(text)) for text in completions]

    trainer = make(tmp_path, reward_funcs=[tiny.reward, shorter], options={"reward_weights": [1.0, 0.01]})
    trainer.train()
    assert all(0 < entry["hpo/share_negative"] < 1 for entry in trainer.state.log_history if "hpo/alpha" in entry)


def test_a_saved_model_card_names_the_paper(tmp_path):
    trainer = make(tmp_path)
    trainer.create_model_card(model_name="tiny")
    text = (tmp_path / "README.md").read_text()
    assert "2605.30201" in text
    assert "hpo" in text


def test_the_model_card_of_a_run_that_is_observed_is_grpos(tmp_path):
    trainer = make(tmp_path, options={"observe": True})
    trainer.create_model_card(model_name="tiny")
    text = (tmp_path / "README.md").read_text()
    assert "2605.30201" not in text
    assert GRPOTrainer._paper["id"] in text


def test_the_overridden_methods_are_where_the_adapter_expects_them():
    """Fails when TRL moves what ``hpo_plugin/trl/trainer.py`` overrides or reads."""
    assert all(callable(getattr(GRPOTrainer, name)) for name in adapter.METHODS)
    assert list(inspect.signature(GRPOTrainer._generate_and_score_completions).parameters) == ["self", "inputs"]
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert source.count("self._calculate_rewards(") == 1
    assert '"advantages": advantages,' in source
    assert "self.multi_objective_aggregation" in source
    assert "num_generations = self.num_generations if mode ==" in source
    # HPO's mean length: the loss is divided by the tokens of the generation batch.
    loss = inspect.getsource(GRPOTrainer._compute_loss)
    assert 'inputs["num_items_in_batch"]' in loss
    assert '"dapo"' in loss
    assert HPOTrainer._paper.keys() <= GRPOTrainer._paper.keys()
