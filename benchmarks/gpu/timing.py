"""The estimator and the policy loss on a device, against verl's, and as a share of the device's bandwidth.

Both are bound by memory. The time in which the device copies as many bytes as must at least move, each input read and
each result written once, is therefore the limit. The bandwidth is that of a large copy, measured in the same process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, compute_grpo_vectorized_outcome_advantage
from verl.utils import as_torch_index

from benchmarks import advantage, policy_loss
from benchmarks._measure import ratio, rounds
from benchmarks._table import Row, number, row
from benchmarks.gpu.exactness import advantages

Calls = dict[str, Callable[[], Any]]

#: Bytes of the copy; more than any cache.
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}
#: Responses x tokens of a step, in groups of 16.
STEPS = {"cuda": ((1024, 512), (16384, 2048)), "cpu": ((1024, 512),)}
#: Responses x tokens of a micro-batch.
MICRO_BATCHES = {"cuda": ((8, 2048), (256, 2048), (2048, 8192)), "cpu": ((8, 2048), (32, 2048))}
GROUP = 16
SECONDS, AT_LEAST = 3.0, 11
#: fp32 rewards and an int64 mask are read, an fp32 result is written.
ADVANTAGE_BYTES = 4 + 8 + 4
#: Two log-probabilities and an advantage in fp32 and a bool mask are read, an fp32 gradient is written.
LOSS_BYTES = 4 + 4 + 4 + 1 + 4


def _synchronize(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def _rounds(calls: Calls, device: str) -> dict[str, list[float]]:
    return rounds(calls, seconds=SECONDS, at_least=AT_LEAST, synchronize=_synchronize(device))


def bandwidth(device: str) -> float:
    """Bytes that a large copy reads and writes, a second."""
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(_rounds({"copy": lambda: target.copy_(source)}, device)["copy"])
    return 2 * COPIED[device] / seconds


def step_calls(responses: int, tokens: int, device: str) -> Calls:
    """Advantages of a step on a device; ours apply α and gather the metrics, so they do more than verl's."""
    rewards, mask, uids = advantage.batch(responses, tokens, GROUP)
    rewards, mask = rewards.to(device), mask.to(device)
    return {
        "ahpo": lambda: advantages(rewards, mask, as_torch_index(uids, rewards.device), "ahpo"),
        "verl grpo_vectorized": lambda: compute_grpo_vectorized_outcome_advantage(rewards, mask, uids)[0],
        "verl grpo": lambda: compute_grpo_outcome_advantage(rewards, mask, uids)[0],
    }


def loss_calls(responses: int, tokens: int, device: str) -> Calls:
    """Forward and backward of a micro-batch in fp32, as verl's ``ppo_loss`` calls it."""
    log_prob, old, of_response, mask = (x.to(device) for x in policy_loss.batch(responses, tokens))
    inputs = (log_prob, old, of_response, mask)
    calls = {name: policy_loss.forward_and_backward(name, inputs) for name in ("ahpo", "vanilla")}
    policy_loss.check(calls["ahpo"], inputs)
    return {"ahpo": calls["ahpo"], "verl vanilla": calls["vanilla"]}


def compare(label: str, calls: Calls, device: str, *, must_move: int = 0, copied: float = 0.0) -> list[Row]:
    """Time ours, which is called ``ahpo``, and verl's in turns.

    Args:
        label: Of the rows.
        calls: What is timed.
        device: Where it runs.
        must_move: Bytes that must at least move; 0: no share of the bandwidth.
        copied: Bytes a second of :func:`bandwidth`.

    Returns:
        The time of each, with its share of the bandwidth, and the ratio of each of verl's to ours with its interval.
    """
    times = _rounds(calls, device)
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        share = f"{100 * must_move / median / copied:.1f} % of the copy bandwidth" if must_move else ""
        rows.append(row(f"{label}: {name}", 1e3 * median, "ms", note=share))
    for name in times:
        if name != "ahpo":
            middle, low, high = ratio(times[name], times["ahpo"])
            note = f"95 % interval {number(low)} to {number(high)}, {len(times[name])} rounds"
            rows.append(row(f"{label}: {name} / ahpo", middle, "times", note=note))
    return rows


def run(device: str) -> list[Row]:
    """Measure everything on a device; and the estimator in the driver, where verl calls it, on the CPU."""
    copied = bandwidth(device)
    rows = [row(f"copy of {COPIED[device] >> 20} MiB", copied / 1e9, "GB/s", note="bytes read and bytes written")]
    for responses, tokens in STEPS[device]:
        calls, moved = step_calls(responses, tokens, device), ADVANTAGE_BYTES * responses * tokens
        label = f"advantages, {responses} x {tokens}"
        rows += compare(label, calls, device, must_move=moved, copied=copied)
    in_driver = advantage.functions(*STEPS[device][0], GROUP)
    advantage.check(in_driver)
    names = {"ahpo": "ahpo", "grpo_vectorized": "verl grpo_vectorized", "grpo": "verl grpo"}
    calls = {shown: in_driver[name] for name, shown in names.items()}
    rows += compare("advantages in verl's driver, {} x {}".format(*STEPS[device][0]), calls, "cpu")
    for responses, tokens in MICRO_BATCHES[device]:
        calls, moved = loss_calls(responses, tokens, device), LOSS_BYTES * responses * tokens
        label = f"policy loss, {responses} x {tokens}"
        rows += compare(label, calls, device, must_move=moved, copied=copied)
    return rows
