"""Weights over gloo, from actor ranks to rollout workers in processes of their own."""

import asyncio

import pytest
import torch
import torch.multiprocessing as multiprocessing

pytest.importorskip("verl")

from hpo_plugin.cpu.checkpoint_engine import GlooCheckpointEngine

#: Of several dtypes and shapes, one of them larger than a bucket, one a view of a larger storage, one a scalar.
WEIGHTS = {
    "embed": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "large": torch.randn(64, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(4, dtype=torch.bfloat16),
    "view": torch.arange(10.0)[2:5],
    "scalar": torch.tensor(7),
}


async def received_by(engine):
    return {name: tensor.tolist() async for name, tensor in engine.receive_weights()}


def participate(index, manager):
    """Two actor ranks (0 and 1), then two rollout workers: two updates, as verl's manager calls the engines."""
    engine = GlooCheckpointEngine(bucket_size=64, **({"is_master": index == 0} if index < 2 else {}))
    for update in range(2):
        manager.send(engine.prepare())
        engine.init_process_group(**manager.recv())
        weights = ((name, tensor + update) for name, tensor in WEIGHTS.items())
        if index < 2:
            asyncio.run(engine.send_weights(weights))
            # Walked to its end, on every actor rank.
            manager.send(list(weights))
        else:
            manager.send(asyncio.run(received_by(engine)))
        engine.finalize()


@pytest.fixture
def in_processes(monkeypatch):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")


def test_every_rollout_worker_receives_every_weight_of_each_update(in_processes):
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe() for _ in range(4)]
    pipes = [here for here, _ in ends]
    processes = [context.Process(target=participate, args=(index, there)) for index, (_, there) in enumerate(ends)]
    for process in processes:
        process.start()
    try:
        for update in range(2):
            metadata = [pipe.recv() for pipe in pipes]
            assert metadata[1:] == [None] * 3
            actors, rollouts = GlooCheckpointEngine.build_topology(2, 2, metadata)
            for index, pipe in enumerate(pipes):
                given = actors if index < 2 else rollouts
                pipe.send({name: values[index % 2] for name, values in given.items()})
            expected = {name: (tensor + update).tolist() for name, tensor in WEIGHTS.items()}
            assert [pipe.recv() for pipe in pipes] == [[], [], expected, expected]
    finally:
        for process in processes:
            process.join(timeout=30)
            process.kill()
    assert [process.exitcode for process in processes] == [0] * 4


def test_one_sender_and_all_receivers_form_the_group():
    actors, rollouts = GlooCheckpointEngine.build_topology(3, 2, [("10.0.0.1", 5), None, None, None, None])
    assert actors == {"rank": [0, -1, -1], "world_size": [3] * 3, "address": [("10.0.0.1", 5)] * 3}
    assert rollouts == {"rank": [1, 2], "world_size": [3] * 2, "address": [("10.0.0.1", 5)] * 2}
