"""The sampler of the CPU backend against verl's own, on a TransferQueue listing held in memory."""

import pytest

pytest.importorskip("transfer_queue")

from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import replay_buffer as verl_replay_buffer

from hpo_plugin.cpu.replay_buffer import SAMPLER_KEYS, replay_buffer


def build(mode="sync", refill_fn=lambda count: count, **changes):
    kwargs = {
        "poll_interval": 0.01,
        "filter_groups_enable": False,
        "filter_groups_metric": "reward",
        "max_inflight_gen_batches": 3,
        "train_batch_size": 4,
        "gen_batch_size": None,
        "sync_refill_failed_groups": False,
    } | changes
    return replay_buffer(
        trainer_mode=mode,
        trainer_config=OmegaConf.create({}),
        max_off_policy_threshold=8,
        max_off_policy_strategy="drop",
        sampler_kwargs=OmegaConf.create({key: value for key, value in kwargs.items() if value != "absent"}),
        refill_fn=refill_fn,
    )


class Listing:
    """Stands for TransferQueue: the keys of one partition, in order of insertion."""

    def __init__(self, monkeypatch, prompts, responses):
        entries = {uid: {"is_prompt": True, "status": "finished", "global_steps": 1} for uid in prompts}
        entries |= {key: {"status": "success", "global_steps": 1} for key in responses}
        self.entries = entries
        monkeypatch.setattr(verl_replay_buffer.tq, "kv_list", lambda: {"train": entries})
        monkeypatch.setattr(verl_replay_buffer.tq, "kv_clear", lambda **kwargs: None)


def test_rows_come_in_the_data_loaders_order_whatever_order_the_responses_finished_in(monkeypatch):
    prompts = ["q", "a", "z"]
    finished = ["z_1_0", "a_10_0", "q_0_0", "a_2_0", "z_0_0", "q_1_0"]
    Listing(monkeypatch, prompts, finished)
    batch, _ = build().sample(global_steps=1, partition_id="train", batch_size=3)
    assert batch.keys == ["q_0_0", "q_1_0", "a_2_0", "a_10_0", "z_0_0", "z_1_0"]


def test_only_the_selected_prompts_rows_are_returned(monkeypatch):
    Listing(monkeypatch, ["q", "a", "z"], ["z_0_0", "a_0_0", "q_0_0"])
    batch, _ = build().sample(global_steps=1, partition_id="train", batch_size=2)
    assert batch.keys == ["q_0_0", "a_0_0"]


def test_group_filter_settings_reach_verls_buffer():
    buffer = build(filter_groups_enable=True, filter_groups_metric="acc", max_inflight_gen_batches=3)
    assert (buffer.filter_groups_metric, buffer.max_inflight_gen_batches, buffer.gen_batch_size) == ("acc", 3, 1)
    plain = build()
    assert (plain.filter_groups_metric, plain.max_inflight_gen_batches, plain.gen_batch_size) == (None, 1, 4)
    assert build(sync_refill_failed_groups=True).gen_batch_size == 1
    assert plain.poll_interval == 0.01


def test_missing_and_unknown_settings_are_named():
    with pytest.raises(ValueError, match=r"missing keys \['train_batch_size'\]"):
        build(train_batch_size="absent")
    with pytest.raises(ValueError, match=r"unknown keys \['poll'\]"):
        build(poll=1)
    assert "poll_interval" in SAMPLER_KEYS


@pytest.mark.parametrize("mode", ["colocate_async", "separate_async"])
def test_asynchronous_trainers_get_verls_asynchronous_buffer_in_the_same_order(monkeypatch, mode):
    buffer = build(mode=mode)
    assert isinstance(buffer, verl_replay_buffer.ReplayBufferAsync)
    assert not isinstance(build(), verl_replay_buffer.ReplayBufferAsync)
    Listing(monkeypatch, ["q", "a", "z"], ["z_0_0", "a_1_0", "a_0_0", "q_0_0"])
    batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=2)
    assert batch.keys == ["q_0_0", "a_0_0", "a_1_0"]


def test_the_name_of_version_0_1_honors_the_settings():
    from hpo_plugin.cpu import replay_buffer as module

    assert module.CPUReplayBuffer is replay_buffer
