r"""HPO and A-HPO: the mathematics, in the symbols of the paper (arXiv 2605.30201).

For N responses with advantages :math:`A_i`, lengths :math:`T_i` and token ratios :math:`r_{it}`:

.. math::

    J = \frac{1}{N} \sum_i \frac{1}{\bar L} \sum_t
        w_i \min\bigl(r_{it} A_i,\ \mathrm{clip}(r_{it}, 1-\varepsilon_{lo}, 1+\varepsilon_{hi})\, A_i\bigr),
    \qquad \bar L = \frac{1}{N} \sum_i T_i

    w_i = 1 \text{ if } A_i \ge 0 \text{ else } \alpha,
    \qquad \text{HPO: } \alpha \in [0, 1] \text{ fixed},
    \qquad \text{A-HPO: } \alpha = \mathrm{clip}(\hat p^+ / \hat p^-,\ \alpha_{\min},\ 1)

===========================================  ==========================================================
in the equations                             in this file
===========================================  ==========================================================
:math:`A_i`, group-relative                  :func:`group_relative_advantage`
the sign of response i                       :func:`response_signs`
:math:`\hat p^+, \hat p^-`                   :func:`count_signs`, :class:`SignCounts`
:math:`\alpha`                               :func:`adaptive_alpha`
:math:`w_i`                                  :func:`hysteretic_weights`
:math:`-\min(r A, \mathrm{clip}(r) A)`       :func:`clipped_surrogate`
:math:`-J`, whole                            :func:`hpo_loss`
===========================================  ==========================================================

Everything is a pure function of tensors. Inputs in half precision are computed in fp32. Nothing here knows of verl.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "STD_EPSILON",
    "ClippedSurrogate",
    "GroupAdvantage",
    "SignCounts",
    "adaptive_alpha",
    "clipped_surrogate",
    "count_signs",
    "group_relative_advantage",
    "hpo_loss",
    "hysteretic_weights",
    "response_signs",
]

STD_EPSILON = 1e-6
"""Added to a group's standard deviation; the value of verl's ``grpo`` (verl/trainer/ppo/core_algos.py)."""

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to ± this before ``exp``, as in every policy loss of verl."""


class GroupAdvantage(NamedTuple):
    """What :func:`group_relative_advantage` returns."""

    advantage: Tensor
    """(N,) floating point: A_i; exactly 0 in degenerate groups and for rows that are not valid."""

    degenerate: Tensor
    """(N,) bool: row i is valid and all valid rewards of its group are equal."""


class SignCounts(NamedTuple):
    """How many responses of a batch have A > 0, A < 0, and any A. Each is a 0-d int64 tensor."""

    positive: Tensor
    negative: Tensor
    responses: Tensor

    def share_positive(self) -> Tensor:
        """p̂⁺: 0-d fp32; 0 for an empty batch."""
        return self.positive / self.responses.clamp(min=1)

    def share_negative(self) -> Tensor:
        """p̂⁻: 0-d fp32; 0 for an empty batch."""
        return self.negative / self.responses.clamp(min=1)


class ClippedSurrogate(NamedTuple):
    """What :func:`clipped_surrogate` returns; every field has the shape of ``log_prob``."""

    loss: Tensor
    """fp32 or fp64, differentiable: the negated surrogate of each token, before any weight, mask or mean."""

    log_ratio: Tensor
    """log r, clamped to ±20; its negative is verl's k1 estimate of KL(old ‖ new)."""

    clipped: Tensor
    """bool: the clip of the ratio decides the loss (verl's ``pg_clipfrac``)."""

    dual_clipped: Tensor
    """bool: the dual clip decides the loss of a negative advantage (verl's ``pg_clipfrac_lower``)."""


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def group_relative_advantage(
    rewards: Tensor,
    groups: Tensor,
    *,
    valid: Tensor | None = None,
    normalize_by_std: bool = True,
    epsilon: float = STD_EPSILON,
) -> GroupAdvantage:
    """A_i = r_i − mean of its group, divided by (std of its group + ε) if ``normalize_by_std``.

    HPO keeps GRPO's advantage (paper, "Known" point 2); mean and std are over the valid rows of the group, the std
    is the unbiased one, as in verl's ``grpo``. Where all valid rewards of a group are equal, a group of one included,
    A is *exactly* 0: the mean of equal floats is in general not equal to them, and dividing the rounding error by
    ε would make signs out of noise, which A-HPO would count.

    Args:
        rewards: (N,) real, one scalar reward a response; any float or integer dtype.
        groups: (N,) int64, a group's number for each response, in any order, ``0 <= groups < N``.
        valid: (N,) bool; rows that are not valid (padding, fully masked) enter no mean and get A = 0. All, if None.
        normalize_by_std: GRPO's division; False is Dr.GRPO's choice.
        epsilon: ε.

    Returns:
        :class:`GroupAdvantage` of (N,) tensors on the device of ``rewards``; fp64 for fp64 rewards, else fp32.

    Raises:
        ValueError: if shapes differ, or a valid reward is NaN or infinite (the message names the rows).
    """
    if rewards.dim() != 1 or groups.shape != rewards.shape or (valid is not None and valid.shape != rewards.shape):
        raise ValueError(
            "rewards, groups and valid must be (N,): got "
            f"{tuple(rewards.shape)}, {tuple(groups.shape)}, {None if valid is None else tuple(valid.shape)}"
        )
    n = rewards.numel()
    if valid is None:
        valid = torch.ones(n, dtype=torch.bool, device=rewards.device)
    bad = valid & ~torch.isfinite(rewards)
    if bool(bad.any()):
        rows = bad.nonzero().flatten().tolist()
        raise ValueError(
            f"rewards must be finite: {len(rows)} of {n} are NaN or infinite, rows {rows[:8]}"
            f"{' …' if len(rows) > 8 else ''}, first value {rewards[rows[0]].item()}. Fix the reward function."
        )

    # fp64: a group statistic is N numbers, not N × T, so the exact way costs nothing.
    r = torch.where(valid, rewards, torch.zeros_like(rewards)).double()
    zeros = torch.zeros(n, dtype=r.dtype, device=r.device)
    size = zeros.index_add(0, groups, valid.double())
    mean = zeros.index_add(0, groups, r) / size.clamp(min=1)
    centered = torch.where(valid, r - mean[groups], 0.0)

    low = torch.full_like(zeros, torch.inf).scatter_reduce(0, groups, r.masked_fill(~valid, torch.inf), "amin")
    high = torch.full_like(zeros, -torch.inf).scatter_reduce(0, groups, r.masked_fill(~valid, -torch.inf), "amax")
    degenerate = valid & (low == high)[groups]

    advantage = centered
    if normalize_by_std:
        variance = zeros.index_add(0, groups, centered.square()) / (size - 1).clamp(min=1)
        advantage = centered / (variance.sqrt()[groups] + epsilon)
    advantage = torch.where(degenerate, 0.0, advantage)
    return GroupAdvantage(advantage.to(rewards.dtype if rewards.dtype == torch.float64 else torch.float32), degenerate)


def response_signs(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """The sign of each response: that of the masked sum of its token advantages.

    For an outcome advantage, equal on all tokens, this is the sign of A_i; for per-token advantages (GAE, optimal
    token baseline) it keeps "responses" the unit that is counted and weighted.

    Args:
        advantages: (N, T) floating point.
        response_mask: (N, T) bool or number, nonzero where a token belongs to the response.

    Returns:
        (N,) fp32 (fp64 for fp64 input) of −1, 0 or 1; 0 for a fully masked row.
    """
    return torch.where(response_mask.bool(), _at_least_fp32(advantages), 0.0).sum(dim=-1).sign()


def count_signs(signs: Tensor, valid: Tensor | None = None) -> SignCounts:
    """Counts for p̂⁺ and p̂⁻: responses with A = 0 are in neither, rows that are not valid in none of the three.

    Args:
        signs: (N,) of −1, 0 or 1 (:func:`response_signs`); any advantages of shape (N,) will do.
        valid: (N,) bool; all, if None.

    Returns:
        :class:`SignCounts`. Counts add up over parts of a batch (ranks); α must be taken from their sum.
    """
    if valid is None:
        valid = torch.ones_like(signs, dtype=torch.bool)
    return SignCounts(((signs > 0) & valid).sum(), ((signs < 0) & valid).sum(), valid.sum())


def adaptive_alpha(counts: SignCounts, alpha_min: float) -> Tensor:
    """α = clip(p̂⁺ / p̂⁻, α_min, 1), A-HPO's weight of negative advantages.

    The number of responses cancels out of the ratio. Its limits are our choice: p̂⁻ = 0 gives 1 (nothing to damp),
    p̂⁺ = 0 with p̂⁻ > 0 gives α_min.

    Args:
        counts: of the *whole* rollout batch of the step, over all ranks; never of a micro-batch.
        alpha_min: α_min in [0, 1].

    Returns:
        0-d fp32 tensor in [α_min, 1].
    """
    ratio = counts.positive / counts.negative.clamp(min=1)
    return torch.where(counts.negative > 0, ratio.clamp(alpha_min, 1.0), 1.0)


def hysteretic_weights(signs: Tensor, alpha: Tensor | float) -> Tensor:
    """w_i = 1 where A_i ≥ 0, α where A_i < 0.

    Args:
        signs: (N,) of −1, 0 or 1.
        alpha: α in [0, 1], a number or a 0-d tensor.

    Returns:
        (N,) tensor, dtype of ``signs``.
    """
    return torch.ones_like(signs).masked_fill(signs < 0, alpha)


def clipped_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None = 3.0,
) -> ClippedSurrogate:
    """−min(r A, clip(r, 1−ε_lo, 1+ε_hi) A) for each token, with the dual clip on negative advantages.

    The same function of its inputs as verl's ``compute_policy_loss_vanilla`` before aggregation. It is positively
    homogeneous in A: for w ≥ 0, weighting the loss by w equals replacing A by w A. That is why HPO can be applied
    by an advantage estimator or by a policy loss, with the same gradient.

    Args:
        log_prob: (N, T) log-probabilities under the current policy; differentiated.
        old_log_prob: (N, T) log-probabilities under the policy that generated (or its recomputation).
        advantages: (N, T), or anything that broadcasts to it.
        clip_low: ε_lo.
        clip_high: ε_hi.
        clip_dual: c > 1; a token with A < 0 costs at most c |A| (arXiv 1912.09729). None: no dual clip.

    Returns:
        :class:`ClippedSurrogate`.
    """
    advantages = _at_least_fp32(advantages)
    log_ratio = (_at_least_fp32(log_prob) - _at_least_fp32(old_log_prob)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    dual_clipped = torch.zeros_like(clipped)
    if clip_dual is not None:
        ceiling = -advantages * clip_dual
        dual_clipped = (advantages < 0) & (loss > ceiling)
        loss = torch.where(advantages < 0, torch.minimum(loss, ceiling), loss)
    return ClippedSurrogate(loss, log_ratio, clipped, dual_clipped)


def hpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    alpha: Tensor | float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float | None = 3.0,
) -> Tensor:
    r"""−J of one whole batch on one device: the reference that every distributed path is tested against.

    :math:`N \bar L` is the number of tokens, so the mean-length normalization is a mean over all tokens of the batch
    (verl's ``loss_agg_mode=token-mean``).

    Args:
        log_prob: (N, T) log-probabilities under the current policy; differentiated.
        old_log_prob: (N, T) log-probabilities under the old policy.
        advantages: (N, T), *unweighted*.
        response_mask: (N, T) bool or number.
        alpha: α of HPO, or A-HPO's from :func:`adaptive_alpha` on the whole batch.
        clip_low: ε_lo.
        clip_high: ε_hi.
        clip_dual: see :func:`clipped_surrogate`.

    Returns:
        0-d loss, fp32 (fp64 for fp64 inputs).
    """
    mask = response_mask.bool()
    weights = hysteretic_weights(response_signs(advantages, mask), alpha)
    surrogate = clipped_surrogate(
        log_prob, old_log_prob, advantages, clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual
    )
    per_token = torch.where(mask, weights.unsqueeze(-1) * surrogate.loss, 0.0)
    return per_token.sum() / mask.sum().clamp(min=1)
