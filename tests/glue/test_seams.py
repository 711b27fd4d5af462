"""The two places where verl has no extension point. These tests fail when verl moves one of them."""

from __future__ import annotations

import ast
import inspect
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import verl
import verl.utils.config
from verl.trainer import main_ppo
from verl.workers import engine_workers
from verl.workers.config import FSDPActorConfig
from verl.workers.engine import BaseEngine
from verl.workers.utils.losses import ppo_loss

from hpo_plugin.glue import seams
from hpo_plugin.glue.config import HPOPolicyLossConfig
from hpo_plugin.glue.registration import RegistrationError
from hpo_plugin.glue.worker import HysteresisTrainingWorker

VERL = Path(verl.__file__).parent


def tree(path: str) -> ast.Module:
    return ast.parse((VERL / path).read_text(encoding="utf-8"))


def imports(path: str) -> set[tuple[str | None, str]]:
    return {
        (node.module, name.name)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }


# Seam 1: validate_config ----------------------------------------------------------------------------------------------


def test_validate_config_of_verl_takes_the_root_config_first():
    wrapped = verl.utils.config.validate_config.__wrapped__
    assert list(inspect.signature(wrapped).parameters) == ["config", "use_reference_policy", "use_critic"]


def test_what_main_ppo_calls_is_our_wrapper():
    assert main_ppo.validate_config is verl.utils.config.validate_config
    assert main_ppo.validate_config._self_wrapper is seams._validate_config


@pytest.mark.parametrize(
    "trainer", ["trainer/main_ppo.py", "trainer/main_ppo_v0.py", "experimental/one_step_off_policy/main_ppo.py"]
)
def test_every_trainer_takes_validate_config_from_the_module_we_wrap_and_calls_it(trainer):
    """They import it after the plugin is loaded, because ``import verl`` loads it."""
    assert ("verl.utils.config", "validate_config") in imports(trainer)
    called = [
        node.func.id for node in ast.walk(tree(trainer)) if isinstance(node, ast.Call) and hasattr(node.func, "id")
    ]
    assert "validate_config" in called


def test_validate_config_runs_verls_own_check_with_what_it_was_given(recipe):
    received = []
    config = recipe()
    seams._validate_config(
        lambda *args, **kwargs: received.append((args, kwargs)), None, (config, False), {"use_critic": True}
    )
    seams._validate_config(lambda *args, **kwargs: received.append((args, kwargs)), None, (), {"config": config})
    assert received == [((config, False), {"use_critic": True}), ((), {"config": config})]


def test_the_check_of_another_version_of_verl_names_both_and_can_be_lifted(monkeypatch):
    monkeypatch.delenv(seams.ALLOW_UNTESTED, raising=False)
    seams.require_supported_verl()
    monkeypatch.setattr(seams, "version", lambda _: "0.10.0")
    with pytest.raises(RegistrationError, match=r"supports verl 0\.9\.1; this is verl 0\.10\.0"):
        seams.require_supported_verl()
    monkeypatch.setenv(seams.ALLOW_UNTESTED, "1")
    seams.require_supported_verl()


def test_another_version_of_verl_stops_runs_with_hysteresis_and_no_others(recipe, monkeypatch):
    monkeypatch.delenv(seams.ALLOW_UNTESTED, raising=False)
    monkeypatch.setattr(seams, "version", lambda _: "0.10.0")
    verl.utils.config.validate_config(recipe(**{"algorithm.policy_loss": "gspo"}), False, False)
    with pytest.raises(RegistrationError, match=r"0\.10\.0"):
        verl.utils.config.validate_config(recipe(**{"algorithm.policy_loss": "ahpo"}), False, False)


# Seam 2: actor_worker_cls ---------------------------------------------------------------------------------------------


def test_the_actors_worker_is_ours_and_every_other_is_verls():
    assert engine_workers.ActorRolloutRefWorker.actor_worker_cls is HysteresisTrainingWorker
    assert engine_workers.ActorRolloutRefWorker.ref_worker_cls is engine_workers.TrainingWorker
    assert HysteresisTrainingWorker.__bases__ == (engine_workers.TrainingWorker,)


def test_the_actors_worker_of_another_package_is_refused_not_replaced():
    class Foreign(engine_workers.TrainingWorker): ...

    owner = type("ActorRolloutRefWorker", (), {"actor_worker_cls": Foreign})
    module = SimpleNamespace(ActorRolloutRefWorker=owner, TrainingWorker=engine_workers.TrainingWorker)
    with pytest.raises(RegistrationError, match=r"already .*Foreign of test_seams; hpo_plugin does not replace it"):
        seams.use_hysteresis_worker(module)
    assert owner.actor_worker_cls is Foreign


def test_train_mini_batch_has_the_signature_and_the_dispatch_we_override():
    ours, theirs = HysteresisTrainingWorker.train_mini_batch, engine_workers.TrainingWorker.train_mini_batch
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters) == ["self", "data"]
    from verl.single_controller.base.decorator import MAGIC_ATTR

    mine, verls = getattr(ours, MAGIC_ATTR), getattr(theirs, MAGIC_ATTR)
    assert mine.keys() == verls.keys()
    assert (mine["execute_mode"], mine["blocking"]) == (verls["execute_mode"], verls["blocking"])


def test_update_actor_hands_the_whole_step_of_its_rank_to_train_mini_batch():
    calls = []
    worker = SimpleNamespace(actor=SimpleNamespace(train_mini_batch=lambda data: calls.append(data)))
    assert inspect.unwrap(engine_workers.ActorRolloutRefWorker.update_actor)(worker, "the step") is None
    assert calls == ["the step"]


def test_the_worker_builds_its_actor_from_actor_worker_cls_with_ppo_loss_bound_to_the_actors_config():
    source = inspect.getsource(engine_workers.ActorRolloutRefWorker)
    assert "self.actor = self.actor_worker_cls(config=actor_training_config)" in source
    assert "self.loss_fn = partial(ppo_loss, config=actor_config)" in source
    assert "distillation_ppo_loss, config=actor_config" in source
    assert "self.actor.set_loss_fn(self.loss_fn)" in source
    assert hasattr(BaseEngine, "get_data_parallel_group")


def test_the_trainer_makes_its_actors_of_the_class_we_change_and_no_subclass_in_verl_undoes_it():
    trainer = "trainer/ppo/v1/trainer_base.py"
    assert ("verl.workers.engine_workers", "ActorRolloutRefWorker") in imports(trainer)
    assert "ray.remote(ActorRolloutRefWorker)" in ast.unparse(tree(trainer))
    detached = tree("experimental/separation/engine_workers.py")
    (cls,) = [n for n in ast.walk(detached) if isinstance(n, ast.ClassDef) and n.name == "DetachActorWorker"]
    assert [ast.unparse(base) for base in cls.bases] == ["ActorRolloutRefWorker"]
    assert "actor_worker_cls" not in ast.unparse(cls)


@pytest.mark.parametrize(
    ("policy_loss", "ours"),
    [({}, False), ({"policy_loss": HPOPolicyLossConfig(loss_mode="ahpo")}, True)],
)
def test_the_worker_finds_our_config_in_the_loss_verl_sets_and_is_verls_own_without_it(monkeypatch, policy_loss, ours):
    config = FSDPActorConfig(rollout_n=8, ppo_micro_batch_size_per_gpu=1, **policy_loss)
    worker = object.__new__(HysteresisTrainingWorker)
    worker.loss_fn = partial(ppo_loss, config=config)
    assert (worker._policy_loss_config is not None) == ours
    if not ours:
        monkeypatch.setattr(engine_workers.TrainingWorker, "train_mini_batch", lambda self, data: ("verl's", data))
        assert inspect.unwrap(HysteresisTrainingWorker.train_mini_batch)(worker, "rows") == ("verl's", "rows")
