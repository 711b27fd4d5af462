"""The commands that recipes print are the ones that verl accepts."""

import shlex
from pathlib import Path

import pytest

pytest.importorskip("verl")

from hpo_plugin.cli._checks import check_arm, check_by_verl, compose

RECIPES = Path(__file__).parents[1] / "recipes"


def arguments(recipe: Path, name: str = "arguments") -> list[str]:
    """The words of a bash array in a recipe's README."""
    _, _, rest = recipe.read_text().partition(f"\n{name}=(\n")
    block, end, _ = rest.partition("\n)\n")
    assert end, f"{recipe} has no array named {name}"
    return shlex.split(block, comments=True)


@pytest.mark.parametrize("policy_loss", ["grpo", "ahpo"])
@pytest.mark.parametrize("config_name", ["hpo_trainer", "hpo_megatron_trainer"])
def test_the_gpu_recipe_of_countdown_passes_verls_own_validation(config_name, policy_loss):
    stated, *overrides = arguments(RECIPES / "countdown" / "README.md")
    assert stated == "--config-name=hpo_trainer"
    # Two mini-batches a step at least: with one, ratios are 1 and clipping never acts.
    values = dict(override.split("=", 1) for override in overrides)
    assert int(values["data.train_batch_size"]) >= 2 * int(values["actor_rollout_ref.actor.ppo_mini_batch_size"])
    config, finding = compose(config_name, [*overrides, f"algorithm.policy_loss={policy_loss}"])
    assert config is not None, finding
    for checked in (check_arm(config), check_by_verl(config)):
        assert checked.ok, checked


@pytest.mark.parametrize("policy_loss", ["grpo", "hpo", "ahpo"])
def test_the_gpu_recipe_of_telelogs_passes_verls_own_validation(policy_loss):
    stated, *overrides = arguments(RECIPES / "telelogs" / "README.md")
    assert stated == "--config-name=telelogs"
    config, finding = compose("telelogs", [*overrides, f"algorithm.policy_loss={policy_loss}"])
    assert config is not None, finding
    for checked in (check_arm(config), check_by_verl(config)):
        assert checked.ok, checked
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.data.train_batch_size * rollout.n == 128
    assert config.data.train_batch_size >= 2 * actor.ppo_mini_batch_size
    # The longest row fits a micro-batch.
    assert actor.ppo_max_token_len_per_gpu >= config.data.max_prompt_length + config.data.max_response_length
    assert (rollout.val_kwargs.n, rollout.val_kwargs.do_sample) == (4, True)
    # 2,400 rows in 1,500 steps, as the RCA paper.
    assert 2_400 // config.data.train_batch_size * config.trainer.total_epochs == 1_500


def test_the_sft_recipe_of_telelogs_makes_what_verls_sft_trainer_takes():
    from verl.utils.config import omega_conf_to_dataclass

    stated, *overrides = arguments(RECIPES / "telelogs" / "README.md", "sft_arguments")
    config, finding = compose(stated.removeprefix("--config-name="), overrides)
    assert config is not None, finding
    # What SFTTrainer._build_config does, but for the model, whose files it would fetch.
    for part in (config.engine, config.optim, config.checkpoint, config.profiler):
        omega_conf_to_dataclass(part)
    # Where RL starts from.
    assert "hf_model" in config.checkpoint.save_contents
    # A number of steps that the epochs do not reach ends the run without a checkpoint.
    assert config.trainer.total_training_steps is None
    assert config.trainer.save_freq == "after_each_epoch"


@pytest.mark.parametrize("config_name", ["telelogs", "telelogs_cpu", "telelogs_sft", "telelogs_sft_cpu"])
def test_the_lengths_of_the_telelogs_configs_hold_the_data(config_name, tmp_path):
    """In bytes, of which no tokenizer makes more tokens than there are; Qwen's makes about half as many."""
    from hpo_plugin.tasks.telelogs import REDUCTIONS, chain_of_thought, diagnose, generate, render_prompt

    config, finding = compose(config_name, [])
    assert config is not None, finding
    laptop = config_name.endswith("_cpu")
    rows = generate(200, seed=11, reduction=REDUCTIONS["laptop" if laptop else "full"]).rows
    prompts = [len(render_prompt(row.case).encode()) for row in rows]
    answers = [len(chain_of_thought(row.case, diagnose(row.case)).encode()) + 1 for row in rows]
    if "sft" in config_name:
        assert max(map(sum, zip(prompts, answers, strict=True))) <= config.data.max_length
        return
    # Tables of numbers: a digit is a token of Qwen2.5, and a prompt of 4,999 characters has 2,700.
    tokens_per_byte = 1 if laptop else 2_700 / 4_999
    assert max(prompts) * tokens_per_byte <= config.data.max_prompt_length
    assert max(answers) * (1 if laptop else 0.75) <= config.data.max_response_length
