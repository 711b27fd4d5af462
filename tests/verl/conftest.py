"""verl's configs, composed once a session: composing costs a second and more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import verl.trainer.config
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from hpo_plugin.verl import self_test

MICRO_BATCHES = (
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
)
"""What verl asks of every run."""

STOCK_DIRECTORY = str(Path(next(iter(verl.trainer.config.__path__))))


@pytest.fixture(scope="session")
def compose_stock() -> Callable[..., DictConfig]:
    """The stock ``ppo_trainer`` or ``ppo_megatron_trainer``, as ``python -m verl.trainer.main_ppo`` composes it."""

    def compose_trainer(*overrides: str, trainer: str = "ppo_trainer") -> DictConfig:
        with initialize_config_dir(STOCK_DIRECTORY, version_base=None):
            return compose(trainer, [*MICRO_BATCHES, *overrides])

    return compose_trainer


@pytest.fixture(scope="session")
def compose_ours(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DictConfig]:
    """A user's recipe: verl's trainer, then our ``hpo``, which Hydra finds through the search-path plugin."""
    directory = tmp_path_factory.mktemp("recipes")
    for trainer in ("ppo_trainer", "ppo_megatron_trainer"):
        (directory / f"recipe_{trainer}.yaml").write_text(
            f"hydra:\n  searchpath: ['file://{STOCK_DIRECTORY}']\ndefaults: [{trainer}, hpo, _self_]\n"
        )

    def compose_recipe(trainer: str, *overrides: str) -> DictConfig:
        with initialize_config_dir(str(directory), version_base=None):
            return compose(f"recipe_{trainer}", [*MICRO_BATCHES, *overrides])

    return compose_recipe


@pytest.fixture(scope="session")
def recipes(compose_ours: Callable[..., DictConfig]) -> dict[str, DictConfig]:
    return {trainer: compose_ours(trainer) for trainer in ("ppo_trainer", "ppo_megatron_trainer")}


@pytest.fixture
def recipe(recipes: dict[str, DictConfig]) -> Iterator[Callable[..., DictConfig]]:
    """A recipe with settings changed: ``recipe("ppo_trainer", **{"algorithm.policy_loss": "hpo"})``.

    A second call within a test undoes the first, and the test's end the last: copying a config takes a second.
    """
    nodes = ("algorithm", "actor_rollout_ref.actor", "actor_rollout_ref.rollout")
    before = {
        (trainer, node): OmegaConf.to_container(OmegaConf.select(config, node), resolve=False)
        for trainer, config in recipes.items()
        for node in nodes
    }

    def undo() -> None:
        for (trainer, node), content in before.items():
            OmegaConf.update(recipes[trainer], node, content, merge=False)

    def change(trainer: str = "ppo_trainer", **settings: Any) -> DictConfig:
        undo()
        for key, value in settings.items():
            assert key.startswith(nodes)
            OmegaConf.update(recipes[trainer], key, value, force_add=True)
        return recipes[trainer]

    yield change
    undo()


@pytest.fixture(autouse=True)
def this_verl_counts_as_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests can run with another version, whose runs print one more line (``test_self_test.py``)."""
    monkeypatch.setattr(self_test, "TESTED_VERL", (*self_test.TESTED_VERL, verl.__version__))
