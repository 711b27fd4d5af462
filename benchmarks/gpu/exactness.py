"""The estimator and both losses on a device, in every floating-point type, against references in fp64 on the CPU.

Inputs are rounded to the type first, and the reference gets the rounded ones, so that what is compared is the
computation alone. Tolerances are multiples of the machine epsilon of the type that the result has, and of the type that
it is computed in: fp64 for fp64, else fp32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks._table import Row
from hpo_plugin import algorithm, fused
from hpo_plugin.variants import VARIANTS, settings

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Multiples of epsilon: more than the roundings of a value, whose number depends on the kernels of the device.
ADVANTAGE_LIMIT, LOSS_LIMIT, GRADIENT_LIMIT = 4.0, 8.0, 8.0
#: Responses x tokens. The last one is more than a block of the one-pass loss (fused.BLOCK_ON_ACCELERATOR).
SHAPES = ((1, 1), (3, 7), (64, 513), (1100, 4096))
ALPHAS = (0.0, 0.25, 1.0)
CLIPS = {"low 0.2, high 0.2, dual 3": (0.2, 0.2, 3.0), "low 0.2, high 0.28, no dual": (0.2, 0.28, None)}


@dataclass(frozen=True)
class Comparison:
    """One tensor against its reference.

    Attributes:
        quantity: What was computed.
        dtype: Of the inputs.
        case: The batch, in words.
        error: Largest error in units of the tolerance: above 1 is wrong.
    """

    quantity: str
    dtype: torch.dtype
    case: str
    error: float


def worst(found: Tensor, reference: Tensor, tolerance: Tensor) -> float:
    """The largest error in units of the tolerance; infinite where a value is NaN, or infinite and its reference not."""
    found, reference = found.detach().cpu().double(), reference.double()
    # Equal infinities have no difference.
    difference = torch.where(found == reference, 0.0, (found - reference).abs())
    # Where the tolerance is 0, only equality will do.
    errors = torch.where(difference == 0, 0.0, difference / tolerance.double())
    return float(torch.nan_to_num(errors, nan=math.inf, posinf=math.inf).amax()) if errors.numel() else 0.0


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- advantages ----------------------------------------------------------------------------------------------------


def advantages(rewards: Tensor, mask: Tensor, groups: Tensor, variant: str) -> Tensor:
    """What every adapter does between rewards and policy loss, on the device of the rewards.

    Args:
        rewards: (N, T) floating point.
        mask: (N, T) of 0 and 1.
        groups: (N,) int64.
        variant: ``hpo`` or ``ahpo``, with default settings.

    Returns:
        (N, T) w_i A_i where the mask is 1, else 0.
    """
    values = {name: setting.default for name, setting in settings().items()}
    reward, magnitude = fused.rewards_of_responses(rewards)
    result = algorithm.hysteretic_advantage(
        reward,
        groups,
        lambda counts: VARIANTS[variant].alpha(counts, values),
        valid=fused.responses_with_tokens(mask),
        magnitude=magnitude,
        lengths=mask.sum(dim=1),
    )
    return fused.spread_over_tokens(result.weighted, mask)


def plain_advantages(
    rewards: Sequence[Sequence[float]], groups: Sequence[int], valid: Sequence[bool], variant: str
) -> tuple[list[float], list[float]]:
    """The definition, written out in Python's floats: w_i A_i, and the scale of the rounding error of each.

    Only α is rounded to fp32, as it is wherever it is computed.
    """
    reward = [math.fsum(tokens) for tokens in rewards]
    advantage, scale = [0.0] * len(reward), [0.0] * len(reward)
    members = defaultdict(list)
    for row, group in enumerate(groups):
        if valid[row]:
            members[group].append(row)
    for rows in members.values():
        mean = math.fsum(reward[row] for row in rows) / len(rows)
        largest = max(math.fsum(map(abs, rewards[row])) for row in rows)
        centered = [reward[row] - mean for row in rows]
        # Rewards that differ by the rounding of fp32 are equal.
        centered = [0.0 if abs(value) <= algorithm.ROUNDING * largest else value for value in centered]
        deviation = math.sqrt(math.fsum(value**2 for value in centered) / max(len(rows) - 1, 1))
        for row, value in zip(rows, centered, strict=True):
            advantage[row] = value / (deviation + algorithm.STD_EPSILON)
            scale[row] = largest / (deviation + algorithm.STD_EPSILON)
    positive, negative = sum(value > 0 for value in advantage), sum(value < 0 for value in advantage)
    alpha_min, alpha = (settings()[name].default for name in ("alpha_min", "alpha"))
    if variant == "ahpo":
        alpha = min(max(positive / negative, alpha_min), 1.0) if negative else 1.0
    alpha = float(torch.tensor(alpha, dtype=torch.float32))
    return [value * (alpha if value < 0 else 1.0) for value in advantage], scale


def reward_batches(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Batches of rewards: (case, (N, T) rewards, (N, T) mask, (N,) groups)."""
    generator = torch.Generator().manual_seed(0)

    def draw(responses: int, tokens: int) -> tuple[Tensor, Tensor]:
        lengths = torch.randint(1, tokens + 1, (responses, 1), generator=generator)
        return lengths, torch.arange(tokens) < lengths

    def on_last_token(values: Tensor, lengths: Tensor, tokens: int) -> Tensor:
        return torch.zeros(len(values), tokens, dtype=dtype).scatter_(1, lengths - 1, values.to(dtype).unsqueeze(1))

    for responses, tokens, size in ((1, 1, 1), (16, 7, 8), (1024, 129, 16)):
        lengths, mask = draw(responses, tokens)
        groups = torch.arange(responses) // size
        sparse = (torch.rand(responses, generator=generator) < 0.2).double()
        yield f"0 or 1, {responses} x {tokens}", on_last_token(sparse, lengths, tokens), mask.long(), groups
        real = torch.rand(responses, generator=generator, dtype=torch.float64)
        yield f"real, {responses} x {tokens}", on_last_token(real, lengths, tokens), mask, groups

    # Eighths on the first tokens, of both signs: every type holds their sums exactly.
    lengths, mask = draw(64, 33)
    eighths = torch.randint(-8, 9, (64, 33), generator=generator) / 8 * (torch.arange(33) < 16) * mask
    shuffled = torch.randperm(64, generator=generator) // 8
    yield "on every token, groups not in order", eighths.to(dtype), mask.long(), shuffled

    # Rows without a token, a group of one, a group of equal rewards, a group without any token.
    lengths, mask = draw(12, 9)
    mask[[1, 5, 10, 11]] = False
    edges = on_last_token(torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1, 1, 0.5, 1, 0]), lengths, 9) * mask
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3])
    yield "rows without tokens, a group of one, equal rewards", edges, mask.long(), groups
    yield "no response with a token", torch.zeros_like(edges), torch.zeros_like(mask), groups


def compare_advantages(device: str, dtype: torch.dtype) -> Iterator[Comparison]:
    """Every batch of rewards, both variants."""
    eps, eps64 = torch.finfo(_computed_in(dtype)).eps, torch.finfo(torch.float64).eps
    for case, rewards, mask, groups in reward_batches(dtype):
        for variant in ("hpo", "ahpo"):
            found = advantages(rewards.to(device), mask.to(device), groups.to(device), variant)
            valid = mask.bool().any(dim=1)
            weighted, scale = plain_advantages(
                rewards.double().tolist(), groups.tolist(), [bool(row) for row in valid], variant
            )
            reference, scales = (torch.tensor(column, dtype=torch.float64).unsqueeze(1) for column in (weighted, scale))
            # What is exactly 0 has to be so: a rounding error would be counted as a sign.
            tolerance = ADVANTAGE_LIMIT * (eps * reference.abs() + eps64 * scales * (reference != 0))
            error = worst(found, reference * mask, tolerance.expand(mask.shape))
            yield Comparison(f"advantages, {variant}", dtype, case, error)


# --- losses --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossBatch:
    """A micro-batch on the CPU.

    Attributes:
        case: In words.
        log_prob: (N, T) in the type that is tested.
        old_log_prob: (N, T) in the same type.
        advantages: (N, 1) in the same type, not weighted; sixteenths, so that a product with α is exact.
        mask: (N, T) of 0 and 1.
        alpha: α.
        clips: ε_lo, ε_hi and the dual clip.
    """

    case: str
    log_prob: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    mask: Tensor
    alpha: float
    clips: tuple[float, float, float | None]

    def keywords(self) -> dict[str, Any]:
        """Of both losses."""
        return dict(zip(("clip_low", "clip_high", "clip_dual"), self.clips, strict=True))


def loss_batches(dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> Iterator[LossBatch]:
    """Micro-batches: each shape with each α and clip, but one of each for a large shape; and a batch without tokens."""
    generator = torch.Generator().manual_seed(1)
    for responses, tokens in shapes:
        old = (-3 * torch.rand(responses, tokens, generator=generator)).to(dtype)
        log_ratio = 0.4 * torch.randn(responses, tokens, generator=generator)
        advantages = (torch.randint(-32, 33, (responses, 1), generator=generator) / 16).to(dtype)
        mask = torch.arange(tokens) < torch.randint(0, tokens + 1, (responses, 1), generator=generator)
        every = [(alpha, name) for alpha in ALPHAS for name in CLIPS]
        for alpha, name in every if responses * tokens < 1 << 20 else every[2:3]:
            clips = CLIPS[name]
            drawn = log_ratio.clone()
            if clips[2] is not None:
                # Beyond the limit of the log-ratio, where only clips keep the loss bounded.
                far = torch.rand(responses, tokens, generator=generator)
                drawn[far < 0.01], drawn[far > 0.99] = -25.0, 25.0
            new = _off_the_kinks((old + drawn).to(dtype), old, clips)
            case = f"{responses} x {tokens}, α = {alpha}, {name}"
            yield LossBatch(case, new, old, advantages, mask if alpha else mask.long(), alpha, clips)
    yield LossBatch("no token", new[:3], old[:3], advantages[:3], torch.zeros_like(mask[:3]), 0.25, clips)


def _off_the_kinks(new: Tensor, old: Tensor, clips: tuple[float, float, float | None]) -> Tensor:
    """Replace log-probabilities whose ratio is so near an end of a clip that rounding decides on which side it is."""
    low, high, dual = clips
    ends = [math.log(end) for end in (1 - low, 1 + high, dual) if end] + [20.0, -20.0]
    log_ratio = new.double() - old.double()
    near = torch.stack([(log_ratio - end).abs() < 1e-3 for end in ends]).any(dim=0)
    return torch.where(near, old, new)


#: A loss of a batch on a device, differentiable in the given log-probabilities.
Loss = Callable[[LossBatch, Tensor, str], Tensor]


def plain_loss(batch: LossBatch, log_prob: Tensor, device: str) -> Tensor:
    """:func:`hpo_plugin.algorithm.hpo_loss`."""
    old, advantages, mask = (x.to(device) for x in (batch.old_log_prob, batch.advantages, batch.mask))
    return algorithm.hpo_loss(log_prob, old, advantages.expand(mask.shape), mask, alpha=batch.alpha, **batch.keywords())


def one_pass_loss(batch: LossBatch, log_prob: Tensor, device: str) -> Tensor:
    """:func:`hpo_plugin.fused.surrogate_loss` on weighted advantages, as the verl adapter calls it."""
    mask = batch.mask.bool()
    # What is outside of the mask must not be used, not even a NaN.
    spoiled = torch.where(mask, batch.old_log_prob, torch.full_like(batch.old_log_prob, math.nan))
    signs = algorithm.response_signs(batch.advantages.expand(mask.shape), mask)
    weights = algorithm.hysteretic_weights(signs, batch.alpha).unsqueeze(1)
    weighted = (batch.advantages * weights).to(batch.advantages.dtype)
    loss, _ = fused.surrogate_loss(
        log_prob,
        spoiled.to(device),
        weighted.to(device),
        batch.mask.to(device),
        scale=1 / max(int(mask.sum()), 1),
        **batch.keywords(),
    )
    return loss


LOSSES: dict[str, Loss] = {"hpo_loss": plain_loss, "surrogate_loss": one_pass_loss}


def reference_loss(batch: LossBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The reference: :func:`hpo_plugin.algorithm.hpo_loss` in fp64.

    Returns:
        Value and gradient, both times the tokens; and Σ |term| (1 + |log r|) over the tokens, the scale of the rounding
        error of the value.
    """
    log_prob = batch.log_prob.double().clone().requires_grad_()
    old, advantages = batch.old_log_prob.double(), batch.advantages.double().expand(batch.mask.shape)
    tokens = batch.mask.sum().clamp(min=1)
    loss = tokens * algorithm.hpo_loss(log_prob, old, advantages, batch.mask, alpha=batch.alpha, **batch.keywords())
    (gradient,) = torch.autograd.grad(loss, log_prob)
    terms = algorithm.clipped_surrogate(batch.log_prob.double(), old, advantages, **batch.keywords())
    sizes = terms.loss.abs() * (1 + terms.log_ratio.abs()) * batch.mask
    return loss.detach(), gradient, sizes.sum()


def compare_losses(device: str, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> Iterator[Comparison]:
    """Value and gradient of each loss on each micro-batch, both times the number of tokens, so that they are near 1."""
    eps = torch.finfo(_computed_in(dtype)).eps
    rounding, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for batch in loss_batches(dtype, shapes):
        value, gradient, sizes = reference_loss(batch)
        log_ratio = (batch.log_prob.double() - batch.old_log_prob.double()).abs()
        tolerance = (GRADIENT_LIMIT * eps * (1 + log_ratio) + rounding) * gradient.abs() + smallest * (gradient != 0)
        for name, loss_of in LOSSES.items():
            leaf = batch.log_prob.to(device).clone().requires_grad_()
            loss = loss_of(batch, leaf, device) * batch.mask.sum().clamp(min=1).to(device)
            loss.backward()
            assert leaf.grad is not None
            yield Comparison(f"{name}, value", dtype, batch.case, worst(loss, value, LOSS_LIMIT * eps * sizes))
            yield Comparison(f"{name}, gradient", dtype, batch.case, worst(leaf.grad, gradient, tolerance))


# --- the table -----------------------------------------------------------------------------------------------------


def compare(device: str, shapes: Sequence[tuple[int, int]] = SHAPES) -> list[Comparison]:
    """All comparisons."""
    found = []
    for dtype in DTYPES:
        found += [*compare_advantages(device, dtype), *compare_losses(device, dtype, shapes)]
    return found


def table(comparisons: Sequence[Comparison]) -> list[Row]:
    """A row for each quantity and type, with the worst batch and its error in tolerances; None if it is not finite."""
    worst_of: dict[tuple[str, torch.dtype], Comparison] = {}
    counts: dict[tuple[str, torch.dtype], int] = defaultdict(int)
    for found in comparisons:
        key = (found.quantity, found.dtype)
        counts[key] += 1
        if key not in worst_of or found.error > worst_of[key].error:
            worst_of[key] = found
    return [
        {
            "quantity": found.quantity,
            "type": str(found.dtype).removeprefix("torch."),
            "batches": counts[key],
            # JSON has no infinity.
            "error": found.error if math.isfinite(found.error) else None,
            "met": found.error <= 1,
            "worst batch": found.case,
        }
        for key, found in worst_of.items()
    ]


def run(device: str) -> list[Row]:
    """Compare everything on a device."""
    return table(compare(device))
