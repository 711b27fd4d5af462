r"""The per-token computations of :mod:`hpo_plugin.algorithm`, in one pass over memory.

:mod:`hpo_plugin.algorithm` has the definitions. A policy loss is limited by memory bandwidth, not by arithmetic: an
implementation with autograd writes and keeps a dozen tensors of the batch's size. One pass is sufficient for two
reasons.

*The gradient is elementwise.* With :math:`x = \log\pi - \log\pi_{old}` and :math:`r = e^x`, response i's surrogate is

.. math::

    s_i = \sum_t u_{it}\, S_{it}, \qquad
    S = \max\bigl(\min(r A,\ \mathrm{clip}(r, 1-\varepsilon_{lo}, 1+\varepsilon_{hi})\, A),\ \min(c A, 0)\bigr)

    \frac{\partial s_i}{\partial \log\pi_{it}} = u_{it}\; r A \; [S = r A] \; [|x| \le 20]

The term :math:`\min(cA, 0)` is the dual clip: it bounds negative advantages and has no effect on the others. The
forward pass writes this one tensor. The backward pass multiplies it by :math:`-k`, where the loss is
:math:`-k \sum_i s_i`.

*All other results are one number per response.* The metrics need only sums over the tokens of a response, computed with
plain tensor code on (N,) tensors.

:math:`A` already contains the hysteretic weight, which :func:`~hpo_plugin.algorithm.hysteretic_advantage` applies.

On a CPU, the pass processes blocks of rows that fit in the cache and reuses the same buffers for each block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpo_plugin import algorithm

__all__ = ["SurrogateSums", "responses_with_tokens", "rewards_of_responses", "spread_over_tokens", "surrogate_loss"]

#: Elements of a block per thread. A block is small enough to stay in the cache. It is large enough that the threads,
#: which synchronize after every operation on a block, synchronize rarely; a core that is busy with another process then
#: costs little.
BLOCK_PER_THREAD = 65536

#: Elements of a block on an accelerator. A batch up to this size is one block, so the number of kernels is constant.
BLOCK_ON_ACCELERATOR = 1 << 22


class SurrogateSums(NamedTuple):
    """Sums over the tokens of each response, for metrics: (N,) of one floating-point dtype, without gradients.

    Attributes:
        objective: s_i: the negative of :attr:`~hpo_plugin.algorithm.ClippedSurrogate.loss` times the token weights,
            summed over the response's tokens.
        sign: :func:`~hpo_plugin.algorithm.response_signs`.
        log_ratio: log r, clamped to ±20, summed over the response's tokens.
        clipped: Number of tokens where the clip of the ratio decides the loss.
        dual_clipped: Number of tokens where the dual clip decides the loss.
    """

    objective: Tensor
    sign: Tensor
    log_ratio: Tensor
    clipped: Tensor
    dual_clipped: Tensor


def surrogate_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    scale: float | Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None = 3.0,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, SurrogateSums]:
    """−k Σ_i Σ_t of :func:`~hpo_plugin.algorithm.clipped_surrogate`: HPO's loss, for k = 1 / tokens of the batch.

    The loss is differentiable in ``log_prob``, once. If another input requires a gradient, the function calls
    :func:`plain_surrogate_loss`. If a ratio is exactly at the dual clip, the gradient is that of the ratio; autograd
    would halve it.

    Args:
        log_prob: (N, T) floating point, log-probabilities under the current policy; differentiated.
        old_log_prob: (N, T) floating point, log-probabilities under the old policy.
        advantages: (N, T) or (N, 1) floating point, with α applied.
        response_mask: (N, T) bool or number; values at tokens where it is 0 have no effect, even if they are NaN.
        scale: k, a number or a 0-d tensor.
        clip_low: ε_lo, in [0, 1].
        clip_high: ε_hi ≥ 0.
        clip_dual: c > 1, or None for no dual clip.
        token_weights: (N, T) floating point, u (verl's ``rollout_is_weights``); 1 if None.

    Returns:
        ``(loss, sums)``: a 0-d loss, and :class:`SurrogateSums`; fp64 if any input is fp64, else fp32.

    Raises:
        ValueError: if ``log_prob`` is not (N, T) or is nested, or the shape of another input does not match it.
    """
    others = [advantages] if token_weights is None else [advantages, token_weights]
    shape, column = log_prob.shape, (*log_prob.shape[:1], 1)
    if (
        len(shape) != 2
        or log_prob.is_nested
        or any(x.shape != shape for x in (old_log_prob, response_mask))
        or any(x.shape not in (shape, column) for x in others)
    ):
        raise ValueError(
            "log_prob, old_log_prob and response_mask must be (N, T); advantages and token_weights must be (N, T) or "
            f"(N, 1): got {[tuple(x.shape) for x in (log_prob, old_log_prob, response_mask, *others)]}"
        )
    mask = response_mask.bool()
    settings = (scale, clip_low, clip_high, clip_dual)
    grad = torch.is_grad_enabled()
    if grad and any(x.requires_grad for x in (old_log_prob, *others)):
        return plain_surrogate_loss(log_prob, old_log_prob, advantages, mask, token_weights, *settings)
    if advantages.shape != shape:
        advantages = advantages.expand(shape)
    if token_weights is not None:
        token_weights = token_weights.expand(shape)
    inputs = (log_prob, old_log_prob, advantages, mask, token_weights, *settings)
    if grad and log_prob.requires_grad:
        loss, *sums = _SurrogateLoss.apply(*inputs)  # type: ignore[no-untyped-call]
    else:
        loss, sums = _loss(*inputs, slope=None)
    return loss, SurrogateSums(*sums)


def plain_surrogate_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    token_weights: Tensor | None,
    scale: float | Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None,
) -> tuple[Tensor, SurrogateSums]:
    """The definition of :func:`surrogate_loss`, with autograd; the tests compare the two."""
    log_prob, old_log_prob, advantages = (torch.where(mask, x, 0.0) for x in (log_prob, old_log_prob, advantages))
    surrogate = algorithm.clipped_surrogate(
        log_prob, old_log_prob, advantages, clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual
    )
    losses = surrogate.loss if token_weights is None else surrogate.loss * torch.where(mask, token_weights, 0.0)

    def over_tokens(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).sum(dim=-1).to(losses.dtype)

    objective = -over_tokens(losses)
    return -scale * objective.sum(), SurrogateSums(
        objective=objective.detach(),
        sign=algorithm.response_signs(advantages, mask).to(losses.dtype).detach(),
        log_ratio=over_tokens(surrogate.log_ratio.detach()),
        clipped=over_tokens(surrogate.clipped),
        dual_clipped=over_tokens(surrogate.dual_clipped),
    )


class _SurrogateLoss(torch.autograd.Function):
    """:func:`_loss` with a gradient. Saves ∂s/∂ log π, one (N, T) tensor, for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        log_prob: Tensor,
        old_log_prob: Tensor,
        advantages: Tensor,
        mask: Tensor,
        token_weights: Tensor | None,
        *settings: Any,
    ) -> tuple[Tensor, ...]:
        slope = torch.empty_like(log_prob, dtype=_dtype(log_prob, old_log_prob, advantages, token_weights))
        loss, sums = _loss(log_prob, old_log_prob, advantages, mask, token_weights, *settings, slope=slope)
        ctx.save_for_backward(slope)
        ctx.scale, ctx.dtype = settings[0], log_prob.dtype
        ctx.mark_non_differentiable(*sums)
        # The sums have no gradients, so torch need not allocate zeros for them.
        ctx.set_materialize_grads(False)
        return loss, *sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 9
        (slope,) = ctx.saved_tensors
        return (slope * (-ctx.scale * grad_loss)).to(ctx.dtype), *[None] * 8


def _loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    token_weights: Tensor | None,
    scale: float | Tensor,
    *clips: Any,
    slope: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and the fields of :class:`SurrogateSums`; writes ∂s/∂ log π to ``slope`` (N, T)."""
    sums = _one_pass(log_prob, old_log_prob, advantages, mask, token_weights, *clips, slope=slope)
    return sums[0].sum() * -scale, sums


def _one_pass(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    token_weights: Tensor | None,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None,
    *,
    slope: Tensor | None,
) -> tuple[Tensor, ...]:
    """The fields of :class:`SurrogateSums`; writes ∂s/∂ log π to ``slope`` (N, T)."""
    dtype, device = _dtype(log_prob, old_log_prob, advantages, token_weights), log_prob.device
    n, t = log_prob.shape
    width = max(min(t, _block_size(device)), 1)
    height = max(min(n, _block_size(device) // width), 1)
    limit = algorithm.LOG_RATIO_LIMIT
    zero = torch.zeros((), dtype=dtype, device=device)
    buffers = torch.empty((3, height, width), dtype=dtype, device=device).unbind()
    # Every block writes its own sums, so the order of the blocks does not matter.
    sums = torch.zeros((max(-(-t // width), 1), 5, n), dtype=dtype, device=device)

    inputs = (log_prob, old_log_prob, advantages, mask, token_weights, slope)
    for new, old, advantage, inside, weight, gradient, of_block in _blocks(inputs, sums, height, width):
        x, a, r = buffers
        if new.shape != x.shape:
            x, a, r = (buffer[: new.shape[0], : new.shape[1]] for buffer in buffers)
        if dtype != new.dtype:
            new = new.to(dtype)
        objective, sign, log_ratio, clipped, dual_clipped = of_block.unbind()

        # 0 outside the mask makes all following results 0 there.
        torch.where(inside, torch.sub(new, old, out=x), zero, out=x)
        torch.where(inside, advantage if advantage.dtype == dtype else advantage.to(dtype), zero, out=a)
        torch.sum(a, dim=1, out=sign)
        torch.clamp(x, -limit, limit, out=r)
        torch.sum(r, dim=1, out=log_ratio)
        if gradient is not None:
            torch.eq(x, r, out=gradient)  # [|x| ≤ 20]
        r.exp_()

        plain = torch.mul(a, r, out=x)  # r A
        bounded = r.clamp_(1 - clip_low, 1 + clip_high).mul_(a)
        surrogate, spare = torch.minimum(plain, bounded, out=r), a
        if clip_dual is not None:
            floor = a.mul_(clip_dual).clamp_(max=0.0)  # min(c A, 0)
            before, surrogate = surrogate, torch.maximum(surrogate, floor, out=floor)
            spare = torch.lt(before, surrogate, out=before)
            torch.sum(spare, dim=1, out=dual_clipped)
        decided = torch.ne(surrogate, plain, out=spare)  # not [S = r A]: by either clip
        torch.sum(decided, dim=1, out=clipped)
        if gradient is not None:
            # Products instead of torch.where: a NaN in the batch must reach the gradient.
            gradient.mul_(plain).addcmul_(gradient, decided, value=-1.0)
        if weight is not None:
            u = torch.where(inside, weight.to(dtype), zero, out=spare)
            surrogate.mul_(u)
            if gradient is not None:
                gradient.mul_(u)
        torch.sum(surrogate, dim=1, out=objective)

    total = sums.sum(dim=0) if len(sums) > 1 else sums[0]
    total[1].sign_()
    total[3].sub_(total[4])
    return total.unbind()


def _dtype(*tensors: Tensor | None) -> torch.dtype:
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def _block_size(device: torch.device) -> int:
    # At most 8 threads' share: with more, the buffers would be larger than most batches.
    return BLOCK_PER_THREAD * min(torch.get_num_threads(), 8) if device.type == "cpu" else BLOCK_ON_ACCELERATOR


def _blocks(inputs: tuple[Tensor | None, ...], sums: Tensor, height: int, width: int) -> Iterator[tuple[Any, ...]]:
    """Split (N, T) inputs into blocks of ``height`` rows and ``width`` columns, with their parts of the sums."""
    log_prob = inputs[0]
    assert log_prob is not None
    if log_prob.shape[0] <= height and log_prob.shape[1] <= width:
        yield *inputs, sums[0]
        return
    strips = [[None] * len(sums) if x is None else torch.split(x, width, dim=1) for x in inputs]
    for *strip, of_strip in zip(*strips, sums, strict=True):
        columns = torch.split(of_strip, height, dim=1)
        yield from zip(
            *([None] * len(columns) if x is None else torch.split(x, height) for x in strip), columns, strict=True
        )


def rewards_of_responses(token_level_rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The reward of each response, and the scale of its rounding.

    Args:
        token_level_rewards: (N, T) real; other dtypes than fp64 are computed in fp32.

    Returns:
        Σ_t r_it and Σ_t |r_it|, both (N,); the same tensor if no token has a negative reward.
    """
    token_level_rewards = algorithm._at_least_fp32(token_level_rewards)
    rewards = token_level_rewards.sum(dim=-1)
    if token_level_rewards.numel() and token_level_rewards.amin() >= 0:
        return rewards, rewards
    return rewards, torch.linalg.vector_norm(token_level_rewards, ord=1, dim=-1)


def responses_with_tokens(response_mask: Tensor) -> Tensor:
    """Whether each response has a token.

    Almost every response has its first token, so on a CPU the function reads the whole mask only for the other
    responses. On an accelerator this selection would need a synchronization, so the function reads the whole mask.

    Args:
        response_mask: (N, T) bool or number.

    Returns:
        (N,) bool.
    """
    t = response_mask.shape[1]
    if response_mask.device.type != "cpu" or t == 0:
        return response_mask.any(dim=1).bool()
    found = response_mask[:, 0] != 0
    for rows in torch.split((~found).nonzero().flatten(), max(_block_size(response_mask.device) // t, 1)):
        found[rows] = response_mask[rows].any(dim=1).bool()
    return found


def spread_over_tokens(values: Tensor, response_mask: Tensor, out: Tensor | None = None) -> Tensor:
    """``values.unsqueeze(-1) * response_mask``, without a floating-point copy of an integer mask.

    Args:
        values: (N,) floating point.
        response_mask: (N, T) of 0 and 1, bool or any number; int64, verl's dtype, takes one pass on a CPU.
        out: (N, T) memory for the result on a CPU, dtype of ``values``; the function allocates it if None.

    Returns:
        (N, T), dtype of ``values``.
    """
    column = values.unsqueeze(-1)
    if response_mask.device.type != "cpu":
        return column * response_mask  # one kernel, which also converts the mask
    if out is None:
        out = torch.empty(response_mask.shape, dtype=values.dtype)
    if response_mask.dtype == torch.int64:
        # The mask is the index into (0, value of the row).
        return torch.gather(torch.cat([torch.zeros_like(column), column], dim=1), 1, response_mask, out=out)
    return out.copy_(response_mask).mul_(column)
