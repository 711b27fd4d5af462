"""The server side of the rollout backend, without Ray: batching, failure, weights."""

import asyncio

import pytest
import torch

pytest.importorskip("verl")

from hpo_plugin.cpu.generation import GenerationRequest, Response, Sampling
from hpo_plugin.cpu.rollout import HFRolloutOptions, RequestBatcher, buckets


class Recorder:
    """A generator that remembers its batches and answers with the prompt."""

    def __init__(self, error=None):
        self.batches = []
        self.error = error

    def __call__(self, requests, sampling):
        self.batches.append((len(requests), sampling))
        if self.error:
            raise self.error
        return [Response(list(request.prompt_ids), [0.0] * len(request.prompt_ids), True) for request in requests]


def submit_all(batcher, count, sampling=lambda index: Sampling(), pause_s=0.0):
    async def run():
        tasks = []
        for index in range(count):
            request = GenerationRequest((index,), 4, seed=index)
            tasks.append(asyncio.create_task(batcher.submit(request, sampling(index))))
            await asyncio.sleep(pause_s)
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(run())


def test_requests_that_arrive_one_by_one_share_a_batch_and_each_gets_its_own_answer():
    recorder = Recorder()
    answers = submit_all(RequestBatcher(recorder, window_s=0.5, max_batch=100), 20, pause_s=0.001)
    assert [answer.token_ids for answer in answers] == [[index] for index in range(20)]
    assert [size for size, _ in recorder.batches] == [20]


def test_a_full_batch_does_not_wait_for_the_window():
    recorder = Recorder()
    batcher = RequestBatcher(recorder, window_s=30, max_batch=5)
    submit_all(batcher, 10)
    assert [size for size, _ in recorder.batches] == [5, 5]


def test_requests_with_different_sampling_do_not_share_a_batch():
    recorder = Recorder()
    batcher = RequestBatcher(recorder, window_s=0.2, max_batch=100)
    submit_all(batcher, 6, sampling=lambda index: Sampling(temperature=index % 2))
    assert sorted((size, s.temperature) for size, s in recorder.batches) == [(3, 0), (3, 1)]


def test_an_error_reaches_every_request_of_its_batch_and_the_next_batch_still_runs():
    recorder = Recorder(error=RuntimeError("no weights"))
    batcher = RequestBatcher(recorder, window_s=0.05, max_batch=2)
    answers = submit_all(batcher, 4)
    assert [str(answer) for answer in answers] == ["no weights"] * 4
    assert len(recorder.batches) == 2


def test_weights_travel_in_buckets_of_the_configured_size_and_none_is_lost():
    tensors = [(f"w{index}", torch.full((index + 1, 4), float(index))) for index in range(6)]

    async def collect():
        return [bucket async for bucket in buckets(iter(tensors), limit=100)]

    collected = asyncio.run(collect())
    # 16, 32, 48 bytes are 96; 64 alone, as 80 more would be 144; 80 alone; 96 alone.
    assert [list(bucket) for bucket in collected] == [["w0", "w1", "w2"], ["w3"], ["w4"], ["w5"]]
    torch.testing.assert_close({k: v for bucket in collected for k, v in bucket.items()}, dict(tensors))


def test_a_negative_batching_window_is_refused_by_its_config_key():
    with pytest.raises(ValueError, match=r"engine_kwargs\.hf_cpu\.batch_window_ms=-1"):
        HFRolloutOptions(batch_window_ms=-1)
