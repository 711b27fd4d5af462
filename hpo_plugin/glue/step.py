"""What is true of a whole training step, on every rank: the sign counts, α, and the sums behind the metrics.

verl calls a policy loss once per micro-batch, which cannot know α of A-HPO. The worker
(:mod:`hpo_plugin.glue.worker`) sees all rows of its rank; it builds one :class:`Step` before the first micro-batch
and makes it current; the loss asks for it. Nothing here touches verl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpo_plugin import algorithm
from hpo_plugin.glue import arms

__all__ = ["GROUP_RELATIVE", "Rows", "Step", "StepError", "current_step", "gather_step", "use_step"]

GROUP_RELATIVE = frozenset(
    {"hpo", "ahpo", "grpo", "grpo_vectorized", "grpo_passk", "rloo", "rloo_vectorized", "opo", "gpg"}
)
"""Estimators that give a group whose rewards are all equal the advantage 0, up to rounding.

Their nonzero advantages never agree over a whole group of two or more; where they do, that is rounding noise. Not so
with ``reinforce_plus_plus_baseline`` and ``gdpo``, which whiten over the batch: there such a group gets minus the mean
over all tokens, which is as large as other advantages if lengths differ, and which the loss trains on.
"""

LOSS_SUMS = ("tokens", "pg_loss_positive", "pg_loss_negative", "clipped", "dual_clipped", "kl")
"""What a micro-batch adds up, in this order (:meth:`Step.add_loss_sums`)."""

AllGather = Callable[[Any], list[Any]]
"""Gives the list of every rank's object, this one's included."""


class StepError(RuntimeError):
    """The policy loss was called where α of the step cannot be known."""


@dataclass(frozen=True)
class Rows:
    """One entry for each response of a rank that has at least one unmasked token.

    All arrays are (n,): ``uid`` str or None, ``sign`` and ``advantage`` float64 (the sign of the masked sum, and the
    advantage of the first unmasked token), ``length`` int64 in tokens, ``mass`` float64 (the masked sum of |A|).
    """

    uid: np.ndarray | None
    sign: np.ndarray
    advantage: np.ndarray
    length: np.ndarray
    mass: np.ndarray

    @classmethod
    def of(cls, advantages: Tensor, response_mask: Tensor, uid: Any | None) -> Rows:
        """Summarize (N, T) advantages and mask, and N uids; fully masked rows are left out."""
        mask = response_mask.bool()
        valid = mask.any(dim=-1)
        kept, mask = advantages[valid].float(), mask[valid]
        first = mask.int().argmax(dim=-1, keepdim=True)
        return cls(
            uid=None if uid is None else np.asarray(uid, dtype=object)[valid.cpu().numpy()].astype(str),
            sign=algorithm.response_signs(kept, mask).double().cpu().numpy(),
            advantage=kept.gather(-1, first).squeeze(-1).double().cpu().numpy(),
            length=mask.sum(dim=-1).cpu().numpy(),
            mass=(kept.abs() * mask).double().sum(dim=-1).cpu().numpy(),
        )

    @classmethod
    def concatenate(cls, parts: list[Rows]) -> Rows:
        """All ranks' rows as one batch."""
        uids = [part.uid for part in parts]
        return cls(
            uid=None if any(u is None for u in uids) else np.concatenate([u for u in uids if u is not None]),
            **{
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in ("sign", "advantage", "length", "mass")
            },
        )


@dataclass
class Step:
    """The statistic of one step's whole rollout batch, the same on every rank."""

    counts: algorithm.SignCounts
    hysteresis: str | None
    alpha: float
    """α that weighs negative responses; 1.0 without hysteresis."""
    metrics: dict[str, float]
    """Statistics of the batch, by verl's metric name without the prefix ``actor/``."""
    _sums: list[Tensor] = field(default_factory=list)

    def add_loss_sums(self, sums: Tensor) -> None:
        """Keep a micro-batch's sums, (6,) fp32 as in :data:`LOSS_SUMS`, on their device: no synchronization."""
        self._sums.append(sums)

    def loss_metrics(self, all_gather: AllGather) -> dict[str, float]:
        """Metrics of the policy loss over all micro-batches, mini-batches, epochs and ranks; collective.

        Args:
            all_gather: over the data-parallel group; every rank must call.

        Returns:
            By verl's metric name without ``actor/``; empty if no rank's loss was ours.
        """
        local = torch.stack(self._sums).double().sum(dim=0).tolist() if self._sums else None
        parts = [part for part in all_gather(local) if part is not None]
        return loss_metrics(dict(zip(LOSS_SUMS, np.sum(parts, axis=0).tolist(), strict=True))) if parts else {}


def loss_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Token means of the sums of :data:`LOSS_SUMS`, named as in verl's log."""
    tokens = max(sums["tokens"], 1.0)
    return {
        "hpo/pg_loss_positive": sums["pg_loss_positive"] / tokens,
        "hpo/pg_loss_negative": sums["pg_loss_negative"] / tokens,
        "pg_clipfrac": sums["clipped"] / tokens,
        "pg_clipfrac_lower": sums["dual_clipped"] / tokens,
        "ppo_kl": sums["kl"] / tokens,
    }


def gather_step(
    rows: Rows,
    *,
    adv_estimator: str,
    hysteresis: str | None,
    weigh: arms.Weigh | None,
    alpha: float,
    alpha_min: float,
    all_gather: AllGather,
) -> Step:
    """Build the :class:`Step` from every rank's rows; collective.

    Args:
        rows: this rank's.
        adv_estimator: value of ``algorithm.adv_estimator``; for those of :data:`GROUP_RELATIVE` a group of two or more
            responses with one and the same nonzero advantage is rounding noise and is not counted.
        hysteresis: ``hpo``, ``ahpo`` or None.
        weigh: ``advantage`` if the rows' advantages are weighted already.
        alpha: α of ``hpo``.
        alpha_min: α_min of ``ahpo``.
        all_gather: over the data-parallel group; every rank must call.

    Returns:
        The same :class:`Step` on every rank.

    Raises:
        StepError: if groups are needed to tell noise from signs and the batch carries no uids, or if an advantage is
            NaN or infinite.
    """
    rows = Rows.concatenate(all_gather(rows))
    bad = np.flatnonzero(~np.isfinite(rows.mass))
    if hysteresis is not None and bad.size:
        raise StepError(
            f"{bad.size} of {rows.mass.size} responses have an advantage that is NaN or infinite"
            + ("" if rows.uid is None else f", in the groups (uid) {', '.join(np.unique(rows.uid[bad])[:8])}")
            + ". Fix the reward function."
        )
    sign = rows.sign
    metrics: dict[str, float] = {}
    if adv_estimator in GROUP_RELATIVE:
        if rows.uid is not None:
            _, group = np.unique(rows.uid, return_inverse=True)
            size = np.bincount(group)
            low, high = np.full(size.size, np.inf), np.full(size.size, -np.inf)
            np.minimum.at(low, group, rows.advantage)
            np.maximum.at(high, group, rows.advantage)
            constant = (low == high) & ((size > 1) | (low == 0))
            sign = np.where(constant[group], 0.0, sign)
            metrics["hpo/share_degenerate_groups"] = float(constant.mean()) if size.size else 0.0
        elif hysteresis is not None and adv_estimator not in arms.HYSTERETIC:
            raise StepError(
                f"{arms.KEY_ESTIMATOR}={adv_estimator} leaves rounding noise in groups whose rewards are all equal, "
                "and this batch has no `uid` to tell such groups by. Set "
                f"{arms.KEY_ESTIMATOR}={hysteresis}, whose zeros are exact."
            )
    counts = algorithm.count_signs(torch.from_numpy(sign))
    if hysteresis == arms.ADAPTIVE:
        value = float(algorithm.adaptive_alpha(counts, alpha_min))
    else:
        value = alpha if hysteresis == "hpo" else 1.0
    weight = np.where((sign < 0) & (weigh == "loss"), value, 1.0)
    positive, negative = (float((rows.mass * weight)[chosen].sum()) for chosen in (sign > 0, sign < 0))
    metrics |= {
        "hpo/alpha": value,
        "hpo/share_positive": float(counts.share_positive()),
        "hpo/share_negative": float(counts.share_negative()),
        "hpo/response_length": float(rows.length.mean()) if rows.length.size else 0.0,
        "hpo/loss_share_positive": positive / (positive + negative) if positive + negative else 0.0,
        "hpo/loss_share_negative": negative / (positive + negative) if positive + negative else 0.0,
    }
    return Step(counts, hysteresis, value, metrics)


_current: ContextVar[Step | None] = ContextVar("hpo_plugin_step", default=None)


def current_step() -> Step | None:
    """The step this process is in, or None outside of :func:`use_step`."""
    return _current.get()


@contextmanager
def use_step(step: Step) -> Iterator[Step]:
    """Make ``step`` the current one while the actor is updated.

    Raises:
        StepError: if there is a current one already.
    """
    if _current.get() is not None:
        raise StepError("a training step is already under way in this process; steps do not nest")
    token = _current.set(step)
    try:
        yield step
    finally:
        _current.reset(token)
