"""Which rows verl's SFT trainer trains after a resume: its own loop, data loader and checkpoints, without a model."""

import functools
import importlib
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from hydra import compose, initialize_config_module
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer import sft_trainer
from verl.utils.checkpoint import OrchestrationMode, checkpoint_handler

EPOCHS, EPOCH, BATCH = 3, 4, 2


class Killed(Exception):
    pass


@pytest.fixture
def resume_module(monkeypatch):
    """Import the module as ``model.external_lib`` does; the method is verl's again after the test."""
    handler = checkpoint_handler.CheckpointHandler
    monkeypatch.setattr(handler, "_load_dataloader_state", handler._load_dataloader_state)
    monkeypatch.setattr(sft_trainer, "log_gpu_memory_usage", lambda *args, **kwargs: None)
    in_one_process = functools.partial(handler, mode=OrchestrationMode.RAY)
    monkeypatch.setattr(sft_trainer, "CheckpointHandler", in_one_process)
    monkeypatch.delitem(sys.modules, "hpo_plugin.verl.sft_resume", raising=False)
    return importlib.import_module("hpo_plugin.verl.sft_resume")


def train(directory, *, killed_after=None, save_every=EPOCH):
    """Run ``SFTTrainer.fit``; return the rows of each step by its number."""
    trainer = MagicMock(val_dataloader=None, test_freq=-1, save_freq=save_every, steps_per_epoch=EPOCH)
    trainer.config.trainer = SimpleNamespace(default_local_dir=str(directory), total_epochs=EPOCHS, logger=[])
    trainer.total_training_steps = EPOCH * EPOCHS
    trainer.engine.is_mp_src_rank_with_outputs.return_value = False
    trainer._get_lora_train_meta.return_value = None
    numbers = list(range(EPOCH * BATCH))
    sampler = trainer.train_sampler = DistributedSampler(numbers, num_replicas=1, rank=0, drop_last=True)
    seen = []

    def collate(rows):
        seen.append(rows)
        return {}

    loader = StatefulDataLoader(numbers, BATCH, sampler=sampler, collate_fn=collate, drop_last=True)
    trainer.train_dataloader = loader
    steps = {}
    sft_trainer.SFTTrainer._build_ckpt_handler(trainer)
    start = trainer.resume_global_step = trainer.ckpt_handler.load_checkpoint()

    def train_batch(data):
        step = start + len(steps) + 1
        if killed_after is not None and step > killed_after:
            raise Killed
        steps[step] = seen[-1]

    trainer.training_client.train_batch.side_effect = train_batch
    try:
        sft_trainer.SFTTrainer.fit(trainer)
    except Killed:
        assert killed_after is not None
    return steps


@pytest.mark.parametrize("save_every", [EPOCH, 3, 1])
@pytest.mark.parametrize("killed_after", [3, 4, 5, 8, 11])
def test_a_resumed_run_trains_every_row_of_every_epoch(resume_module, tmp_path, killed_after, save_every):
    whole = train(tmp_path / "whole", save_every=save_every)
    assert sorted(whole) == list(range(1, EPOCHS * EPOCH + 1))
    before = train(tmp_path / "killed", killed_after=killed_after, save_every=save_every)
    after = train(tmp_path / "killed", save_every=save_every)
    first = killed_after // save_every * save_every + 1
    assert sorted(after) == list(range(first, EPOCHS * EPOCH + 1))
    merged = before | after
    assert merged == whole
    for epoch in range(EPOCHS):
        rows = [row for step in range(EPOCH) for row in merged[epoch * EPOCH + step + 1]]
        assert sorted(rows) == list(range(EPOCH * BATCH))


@pytest.mark.parametrize("name", ["telelogs_sft", "telelogs_sft_cpu"])
def test_the_sft_configs_import_the_module_and_keep_the_checkpoint_that_verl_has_recorded(name, monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    with initialize_config_module(config_module="verl.trainer.config", version_base=None):
        config = compose(name, ["model.path=x", "data.train_files=y"])
    libraries = config.model.external_lib
    assert "hpo_plugin.verl.sft_resume" in ([libraries] if isinstance(libraries, str) else libraries)
    assert config.trainer.max_ckpt_to_keep == 2


def test_a_version_of_verl_without_the_method_is_an_error(resume_module, monkeypatch):
    monkeypatch.delattr(checkpoint_handler.CheckpointHandler, "_load_dataloader_state")
    with pytest.raises(RuntimeError, match="has no method _load_dataloader_state"):
        resume_module.restore_within_epochs()
