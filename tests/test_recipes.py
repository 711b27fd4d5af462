"""The commands that recipes print are the ones that verl accepts."""

import shlex
from pathlib import Path

import pytest

pytest.importorskip("verl")

from hpo_plugin.cli._checks import check_arm, check_by_verl, compose

RECIPES = Path(__file__).parents[1] / "recipes"


def arguments(recipe: Path) -> list[str]:
    """The words of the bash array ``arguments`` in a recipe's README."""
    _, _, rest = recipe.read_text().partition("arguments=(\n")
    block, end, _ = rest.partition("\n)\n")
    assert end, f"{recipe} has no array named arguments"
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
