"""Signs, α and shares of the update for the rollouts of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hpo_plugin.algorithm import adaptive_alpha, count_signs, group_relative_advantage
from hpo_plugin.preview.rollouts import StepRows

__all__ = ["StepPreview", "preview_step"]


@dataclass(frozen=True)
class StepPreview:
    """One step. A share of nothing is NaN.

    Attributes:
        step: Its number.
        responses: How many.
        groups: How many.
        degenerate_groups: Groups whose rewards are all equal: no signal.
        share_positive: p̂⁺, of all responses.
        share_negative: p̂⁻.
        alpha: A-HPO's α for each α_min.
        length: Mean length.
        length_positive: Of responses with a positive advantage.
        length_negative: Of responses with a negative advantage.
        tokens_negative: Their share of the length of all responses with a signal.
        abs_advantage_negative: Share of Σ|A_i|: of the update where each response counts 1/T_i a token (GRPO).
        abs_advantage_tokens_negative: Share of Σ T_i |A_i|: of the update where each token counts the same (token mean,
            or a constant divisor).
        shaped_positive: Of the positive responses in groups whose rows all have ``acc``, the share in groups without a
            success.
    """

    step: int
    responses: int
    groups: int
    degenerate_groups: int
    share_positive: float
    share_negative: float
    alpha: dict[float, float]
    length: float
    length_positive: float
    length_negative: float
    tokens_negative: float
    abs_advantage_negative: float
    abs_advantage_tokens_negative: float
    shaped_positive: float

    def update_share(self, alpha: float, *, per_response: bool = False) -> float:
        """The negative responses' share of the update, if their advantages are multiplied by α.

        Args:
            alpha: 1 for GRPO.
            per_response: Each response is divided by its own length, as in GRPO; else all by the mean length, or by a
                constant.
        """
        share = self.abs_advantage_negative if per_response else self.abs_advantage_tokens_negative
        total = alpha * share + 1 - share
        return alpha * share / total if total else math.nan

    @property
    def has_signal(self) -> bool:
        """Whether any response has an advantage."""
        return self.share_positive + self.share_negative > 0


def preview_step(rows: StepRows, alpha_mins: tuple[float, ...]) -> StepPreview:
    """Compute a step's figures with the functions that training uses.

    Args:
        rows: The step's rows; rewards are at most ``REWARD_LIMIT`` in magnitude.
        alpha_mins: Values of α_min.
    """
    groups = torch.from_numpy(rows.groups)
    advantage, degenerate = group_relative_advantage(torch.from_numpy(rows.rewards).float(), groups)
    counts = count_signs(advantage)
    lengths, positive, negative = torch.from_numpy(rows.lengths), advantage > 0, advantage < 0
    magnitude = advantage.abs().double()
    acc = torch.from_numpy(rows.acc)
    number = int(groups.max()) + 1
    succeeded = torch.zeros(number, dtype=torch.bool).index_put((groups[acc > 0],), torch.tensor(True))
    unknown = torch.zeros(number, dtype=torch.bool).index_put((groups[acc.isnan()],), torch.tensor(True))
    judged = groups[positive & ~unknown[groups]]
    return StepPreview(
        step=rows.step,
        responses=len(groups),
        groups=number,
        degenerate_groups=len(groups[degenerate].unique()),
        share_positive=float(counts.share_positive()),
        share_negative=float(counts.share_negative()),
        alpha={alpha_min: float(adaptive_alpha(counts, alpha_min)) for alpha_min in alpha_mins},
        length=float(lengths.mean()),
        length_positive=float(lengths[positive].mean()),
        length_negative=float(lengths[negative].mean()),
        tokens_negative=_share(lengths, negative, positive),
        abs_advantage_negative=_share(magnitude, negative, positive),
        abs_advantage_tokens_negative=_share(magnitude * lengths, negative, positive),
        shaped_positive=float((~succeeded[judged]).double().mean()),
    )


def _share(values: torch.Tensor, part: torch.Tensor, rest: torch.Tensor) -> float:
    return float(values[part].sum() / (values[part].sum() + values[rest].sum()))
