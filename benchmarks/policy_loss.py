"""The policy loss against verl's, forward and backward: ``python -m benchmarks.policy_loss``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

from benchmarks._measure import medians, peak_bytes
from benchmarks._table import Row, markdown, row
from hpo_plugin.algorithm import hpo_loss, hysteretic_weights, response_signs
from hpo_plugin.verl.config import HPOPolicyLossConfig

#: Responses × tokens of a micro-batch: 4k to 512k tokens.
SIZES = ((2, 2048), (8, 2048), (32, 2048), (256, 2048))

#: 512k tokens in other shapes.
SHAPES = ((4096, 128), (64, 8192), (4, 131072))

#: So few tokens that what is left is the fixed cost of the calls.
NEXT_TO_NOTHING = (2, 8)

ALPHA = 0.25
Call = Callable[[], tuple[Tensor, Tensor]]
REFERENCES = ("vanilla", "gspo", "sapo")


def batch(responses: int, tokens: int) -> tuple[Tensor, ...]:
    """log_prob, old_log_prob, advantages and mask of a micro-batch whose ratios lie on both sides of every clip."""
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(responses, tokens, generator=generator)
    log_prob = old + 0.4 * torch.randn(responses, tokens, generator=generator)
    mask = torch.arange(tokens) < torch.randint(tokens // 2, tokens + 1, (responses, 1), generator=generator)
    return log_prob, old, torch.randn(responses, 1, generator=generator) * mask, mask


def forward_and_backward(name: str, inputs: tuple[Tensor, ...]) -> Call:
    """The loss of one micro-batch and its gradient, as verl's ``ppo_loss`` calls it."""
    log_prob, old, advantages, mask = inputs
    advantages = advantages * hysteretic_weights(response_signs(advantages, mask), ALPHA).unsqueeze(1)
    config = FSDPActorConfig(
        rollout_n=8,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=HPOPolicyLossConfig(loss_mode=name, adv_estimator="ahpo"),
    )
    # A micro-batch knows the tokens and responses of its mini-batch: here, it is the mini-batch.
    config.global_batch_info.update(
        {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": len(mask), "loss_scale_factor": None}
    )
    loss_fn = get_policy_loss_fn(name)
    aggregation = "seq-mean-token-mean" if name == "gspo" else "token-mean"

    def call() -> tuple[Tensor, Tensor]:
        leaf = log_prob.detach().requires_grad_()
        loss, _ = loss_fn(old, leaf, advantages, mask, aggregation, config)
        loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    return call


def check(ahpo: Call, inputs: tuple[Tensor, ...]) -> None:
    """The plain definition, to 1e-6 in fp32: gradients relative to each, the loss to the mean size of its terms."""
    loss, gradient = ahpo()
    log_prob, *rest = inputs
    leaf = log_prob.clone().requires_grad_()
    expected = hpo_loss(leaf, *rest, alpha=ALPHA)
    expected.backward()
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-6 * float(rest[1].abs().mean()))


def run() -> list[Row]:
    """Speed and memory of forward and backward for each size of a micro-batch, then for other shapes; fixed costs."""
    rows: list[Row] = []
    for responses, tokens in (*SIZES, *SHAPES):
        inputs = batch(responses, tokens)
        timed = {name: forward_and_backward(name, inputs) for name in ("ahpo", *REFERENCES)}
        check(timed["ahpo"], inputs)
        total = responses * tokens
        seconds = medians(timed, seconds=2)
        peak = {name: peak_bytes(call) / (4 * total) for name, call in timed.items()}
        at = f"{responses} x {tokens}"
        rows += [row(f"{name}, {at}", seconds[name] * 1e3, "ms") for name in timed]
        rows += [row(f"{name}, {at}: peak memory", peak[name], "log_probs") for name in timed]
        rows += [
            row(f"ahpo, {at}: faster than vanilla", seconds["vanilla"] / seconds["ahpo"], "times", at_least=2),
            row(f"ahpo, {at}: memory over vanilla's", peak["ahpo"] / peak["vanilla"], "of it", at_most=1 / 3),
        ]
    inputs = batch(*NEXT_TO_NOTHING)
    seconds = medians({name: forward_and_backward(name, inputs) for name in ("ahpo", *REFERENCES)}, seconds=2)
    at = f"{NEXT_TO_NOTHING[0]} x {NEXT_TO_NOTHING[1]}"
    rows += [row(f"limit: fixed cost of {name}, {at}", value * 1e3, "ms") for name, value in seconds.items()]
    return rows


def main() -> None:
    """Print the table."""
    print(markdown(run()))


if __name__ == "__main__":
    main()
