r"""The token-sized parts of :mod:`hpo_plugin.algorithm` in one pass over memory; the definitions are there.

A policy loss is bound by memory, not by arithmetic: written with autograd, it writes and keeps a dozen tensors of the
batch's size. Two things make one pass enough.

*The gradient is elementwise.* With :math:`x = \log\pi - \log\pi_{old}` and :math:`r = e^x`, response i's surrogate is

.. math::

    s_i = \sum_t u_{it}\, S_{it}, \qquad
    S = \max\bigl(\min(r A,\ \mathrm{clip}(r, 1-\varepsilon_{lo}, 1+\varepsilon_{hi})\, A),\ \min(c A, 0)\bigr)

    \frac{\partial s_i}{\partial \log\pi_{it}} = u_{it}\; r A \; [S = r A] \; [|x| \le 20]

(:math:`\min(cA, 0)` is the dual clip: it bounds negative advantages, and 0 never binds for the others). So the forward
pass writes this one tensor. The backward pass multiplies it with a number a response, :math:`-k w_i`, where the loss is
:math:`-k \sum_i w_i s_i`.

*Everything else is a number a response.* The weight :math:`w_i` and the metrics need only sums over its tokens: plain
tensor code on (N,) tensors.

On a CPU the pass goes over blocks of rows that fit the cache, in buffers that are used again for each block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpo_plugin import algorithm

__all__ = ["SurrogateSums", "hysteretic_loss", "responses_with_tokens", "spread_over_tokens"]

BLOCK_PER_THREAD = 65536
"""Elements: few enough that a block stays in the cache, and so many that threads, which wait for each other after every
operation on a block, do so rarely: a core that is busy with something else then costs little."""

BLOCK_ON_ACCELERATOR = 1 << 22
"""Elements: a batch within it is one block, so that the number of kernels does not grow with it."""


class SurrogateSums(NamedTuple):
    """What a loss is made of, for metrics: (N,) of one floating-point dtype, without gradients."""

    weight: Tensor
    """w_i, :func:`~hpo_plugin.algorithm.hysteretic_weights`."""

    objective: Tensor
    """s_i: the negative of :attr:`~hpo_plugin.algorithm.ClippedSurrogate.loss` times the token weights, summed over the
    response's tokens; before the hysteretic weight."""

    sign: Tensor
    """:func:`~hpo_plugin.algorithm.response_signs`."""

    log_ratio: Tensor
    """log r, clamped to ±20, summed over the response's tokens."""

    clipped: Tensor
    """How many tokens the clip of the ratio decides."""

    dual_clipped: Tensor
    """How many tokens the dual clip decides."""


def hysteretic_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    alpha: float,
    scale: float | Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None = 3.0,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, SurrogateSums]:
    """−k Σ_i w_i Σ_t of :func:`~hpo_plugin.algorithm.clipped_surrogate`: HPO's loss, for k = 1 / tokens of the batch.

    Differentiable in ``log_prob``, once. If another input requires a gradient, the loss is that of
    :func:`plain_hysteretic_loss`. Where a ratio lies exactly on the dual clip the gradient is that of the ratio;
    autograd halves it there.

    Args:
        log_prob: (N, T) floating point, log-probabilities under the current policy; differentiated.
        old_log_prob: (N, T) floating point, log-probabilities under the old policy.
        advantages: (N, T) or (N, 1) floating point, *unweighted*.
        response_mask: (N, T) bool or number; what stands where it is 0 is never used, not even a NaN.
        alpha: α in [0, 1].
        scale: k, a number or a 0-d tensor.
        clip_low: ε_lo, in [0, 1].
        clip_high: ε_hi ≥ 0.
        clip_dual: c > 1, or None: no dual clip.
        token_weights: (N, T) floating point, u (verl's ``rollout_is_weights``); 1 if None.

    Returns:
        ``(loss, sums)``: 0-d, and :class:`SurrogateSums`; fp32 (fp64 if any input is); half precision is computed in
        fp32.

    Raises:
        ValueError: if ``log_prob`` is not (N, T) or another input's shape does not fit it.
    """
    others = [advantages] if token_weights is None else [advantages, token_weights]
    shape, column = log_prob.shape, (*log_prob.shape[:1], 1)
    if (
        len(shape) != 2
        or any(x.shape != shape for x in (old_log_prob, response_mask))
        or any(x.shape not in (shape, column) for x in others)
    ):
        raise ValueError(
            "log_prob, old_log_prob and response_mask must be (N, T), advantages and token_weights that or (N, 1): got "
            f"{[tuple(x.shape) for x in (log_prob, old_log_prob, response_mask, *others)]}"
        )
    mask = response_mask.bool()
    settings = (alpha, scale, clip_low, clip_high, clip_dual)
    grad = torch.is_grad_enabled()
    if grad and any(x.requires_grad for x in (old_log_prob, *others)):
        return plain_hysteretic_loss(log_prob, old_log_prob, advantages, mask, token_weights, *settings)
    if advantages.shape != shape:
        advantages = advantages.expand(shape)
    if token_weights is not None:
        token_weights = token_weights.expand(shape)
    inputs = (log_prob, old_log_prob, advantages, mask, token_weights, *settings)
    if grad and log_prob.requires_grad:
        loss, *sums = _HystereticLoss.apply(*inputs)  # type: ignore[no-untyped-call]
    else:
        loss, _, sums = _loss(*inputs, slope=None)
    return loss, SurrogateSums(*sums)


def plain_hysteretic_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    token_weights: Tensor | None,
    alpha: float,
    scale: float | Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None,
) -> tuple[Tensor, SurrogateSums]:
    """The definition of :func:`hysteretic_loss`, with autograd: what it is tested against."""
    surrogate = algorithm.clipped_surrogate(
        log_prob, old_log_prob, advantages, clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual
    )
    losses = surrogate.loss if token_weights is None else surrogate.loss * token_weights

    def over_tokens(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).sum(dim=-1).to(losses.dtype)

    objective = -over_tokens(losses)
    sign = algorithm.response_signs(advantages, mask).to(losses.dtype)
    weight = algorithm.hysteretic_weights(sign, alpha)
    return -scale * torch.dot(weight, objective), SurrogateSums(
        weight=weight.detach(),
        objective=objective.detach(),
        sign=sign.detach(),
        log_ratio=over_tokens(surrogate.log_ratio.detach()),
        clipped=over_tokens(surrogate.clipped),
        dual_clipped=over_tokens(surrogate.dual_clipped),
    )


class _HystereticLoss(torch.autograd.Function):
    """Gives :func:`_loss` its gradient: keeps ∂s/∂ log π, one (N, T) tensor, and the factor of each response."""

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
        loss, factor, sums = _loss(log_prob, old_log_prob, advantages, mask, token_weights, *settings, slope=slope)
        ctx.save_for_backward(slope, factor)
        ctx.dtype = log_prob.dtype
        ctx.mark_non_differentiable(*sums)
        # The sums have no gradients: no zeros are made for them.
        ctx.set_materialize_grads(False)
        return loss, *sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 10
        slope, factor = ctx.saved_tensors
        return (slope * (factor * grad_loss).unsqueeze(-1)).to(ctx.dtype), *[None] * 9


def _loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    token_weights: Tensor | None,
    alpha: float,
    scale: float | Tensor,
    *clips: Any,
    slope: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The loss, ∂loss/∂s_i (N,), and the fields of :class:`SurrogateSums`; writes ∂s/∂ log π to ``slope`` (N, T)."""
    sums = _one_pass(log_prob, old_log_prob, advantages, mask, token_weights, *clips, slope=slope)
    objective, sign, *_ = sums
    weight = algorithm.hysteretic_weights(sign, alpha)
    factor = weight * -scale
    return torch.dot(factor, objective), factor, (weight, *sums)


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
    """The fields of :class:`SurrogateSums` but the first; writes ∂s/∂ log π to ``slope`` (N, T)."""
    dtype, device = _dtype(log_prob, old_log_prob, advantages, token_weights), log_prob.device
    n, t = log_prob.shape
    width = max(min(t, _block_size(device)), 1)
    height = max(min(n, _block_size(device) // width), 1)
    limit = algorithm.LOG_RATIO_LIMIT
    zero = torch.zeros((), dtype=dtype, device=device)
    buffers = torch.empty((3, height, width), dtype=dtype, device=device).unbind()
    # Every block writes sums of its own, so that no order of addition has to be kept.
    sums = torch.zeros((max(-(-t // width), 1), 5, n), dtype=dtype, device=device)

    inputs = (log_prob, old_log_prob, advantages, mask, token_weights, slope)
    for new, old, advantage, inside, weight, gradient, of_block in _blocks(inputs, sums, height, width):
        x, a, r = buffers
        if new.shape != x.shape:
            x, a, r = (buffer[: new.shape[0], : new.shape[1]] for buffer in buffers)
        if dtype != new.dtype:
            new = new.to(dtype)
        objective, sign, log_ratio, clipped, dual_clipped = of_block.unbind()

        # 0 outside of the mask makes all that follows 0 there.
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
            # Products, not a selection: a NaN in the batch must reach the gradient.
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
    # Not more than 8 threads' worth: beyond it the buffers would be larger than most batches.
    return BLOCK_PER_THREAD * min(torch.get_num_threads(), 8) if device.type == "cpu" else BLOCK_ON_ACCELERATOR


def _blocks(inputs: tuple[Tensor | None, ...], sums: Tensor, height: int, width: int) -> Iterator[tuple[Any, ...]]:
    """Cut (N, T) inputs into blocks of ``height`` rows and ``width`` columns, and (strips, 5, N) sums alike."""
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


def responses_with_tokens(response_mask: Tensor) -> Tensor:
    """Which responses have a token at all, reading no more of the mask than it takes.

    Almost every response has its first token, so on a CPU only the others are read whole. On an accelerator the choice
    would cost a synchronization, and the mask is read whole.

    Args:
        response_mask: (N, T) bool or number.

    Returns:
        (N,) bool.
    """
    t = response_mask.shape[1]
    if response_mask.device.type != "cpu" or t == 0:
        return response_mask.any(dim=1)
    found = response_mask[:, 0] != 0
    for rows in torch.split((~found).nonzero().flatten(), max(_block_size(response_mask.device) // t, 1)):
        found[rows] = response_mask[rows].any(dim=1)
    return found


def spread_over_tokens(values: Tensor, response_mask: Tensor) -> Tensor:
    """``values.unsqueeze(-1) * response_mask``, without a copy of an integer mask in floating point.

    Args:
        values: (N,) floating point.
        response_mask: (N, T) of 0 and 1, bool or any number; int64, as verl has it, takes one pass on a CPU.

    Returns:
        (N, T), dtype of ``values``.
    """
    column = values.unsqueeze(-1)
    if response_mask.device.type != "cpu":
        return column * response_mask  # one kernel, which converts as it reads
    if response_mask.dtype == torch.int64:
        # 0 or the row's value: the mask is itself the index.
        return torch.cat([torch.zeros_like(column), column], dim=1).gather(1, response_mask)
    return torch.empty(response_mask.shape, dtype=values.dtype).copy_(response_mask).mul_(column)
