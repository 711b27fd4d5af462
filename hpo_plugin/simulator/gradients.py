"""What α does to an update: gradients of positive and negative advantages, and AdamW's step with and without α."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hpo_plugin.simulator.loop import Update

#: One tensor for each parameter, in the order of ``SmallQwen2.parameters``.
_Gradient = Sequence[Tensor]


def compare_gradients(update: Update) -> Mapping[str, float]:
    """Split the gradient of a step by the sign of the advantage.

    An observer for :func:`hpo_plugin.simulator.loop.simulate`.

    The gradient is that of the policy-gradient objective on the whole rollout batch at the policy that sampled it,
    where every importance ratio is 1 and nothing is clipped, with the config's aggregation and before α is applied.

    Args:
        update: The step.

    Returns:
        Nothing in a step without positive or without negative advantages. Otherwise:

        - ``gradients/ratio``: norm of the negative part over that of the positive part;
        - ``gradients/cosine``: of the angle between the two;
        - ``gradients/alpha``: the α that A-HPO has for this batch, whatever the run's algorithm is;
        - ``gradients/turn``, ``gradients/length``: angle in degrees between the gradients with this α and with α = 1,
          and ratio of their norms;
        - ``gradients/adamw_turn``, ``gradients/adamw_length``: the same of AdamW's step, with its state before it;
        - ``gradients/step``: norm of AdamW's step with the α of the run, over the learning rate.
    """
    positive, negative = (_gradient(update, sign) for sign in (1, -1))
    if positive is None or negative is None:
        return {}
    ours, plain, own = (
        [p + alpha * n for p, n in zip(positive, negative, strict=True)]
        for alpha in (update.adaptive_alpha, 1.0, update.alpha)
    )
    ours_step, plain_step, own_step = (_adamw(update.optimizer, gradient) for gradient in (ours, plain, own))
    return {
        "gradients/ratio": _norm(negative) / _norm(positive),
        "gradients/cosine": _cosine(positive, negative),
        "gradients/alpha": update.adaptive_alpha,
        "gradients/turn": _degrees(ours, plain),
        "gradients/length": _norm(ours) / _norm(plain),
        "gradients/adamw_turn": _degrees(ours_step, plain_step),
        "gradients/adamw_length": _norm(ours_step) / _norm(plain_step),
        "gradients/step": _norm(own_step),
    }


def _gradient(update: Update, sign: int) -> _Gradient | None:
    """Gradient of the loss of the responses whose advantage has a sign; None without such."""
    rows = (update.advantages * sign > 0).nonzero()[:, 0]
    if not len(rows):
        return None
    mask = update.samples.mask[rows]
    log_probs = update.model.log_probs([update.prompts[row] for row in rows], update.samples.tokens[rows], mask)
    lengths = mask.sum(dim=1)
    if update.loss_agg_mode == "token-mean":
        weights = torch.full((len(rows),), 1 / float(update.samples.mask.sum()))
    elif update.loss_agg_mode == "seq-mean-token-mean":
        weights = 1 / (lengths * len(update.samples.mask))
    else:
        raise ValueError(
            f"loss_agg_mode={update.loss_agg_mode} is not supported; set token-mean or seq-mean-token-mean"
        )
    loss = -(update.advantages[rows] * weights * log_probs.sum(dim=1)).sum()
    return torch.autograd.grad(loss, update.model.parameters)


@torch.no_grad()
def _adamw(optimizer: torch.optim.AdamW, gradient: _Gradient) -> _Gradient:
    """AdamW's step for a gradient, without weight decay, over the learning rate; the optimizer is not changed."""
    (group,) = optimizer.param_groups
    (beta1, beta2), eps = group["betas"], group["eps"]
    steps = []
    for parameter, g in zip(group["params"], gradient, strict=True):
        state = optimizer.state.get(parameter, {})
        count = float(state["step"]) + 1 if state else 1.0
        first = (1 - beta1) * g + (beta1 * state["exp_avg"] if state else 0)
        second = (1 - beta2) * g.square() + (beta2 * state["exp_avg_sq"] if state else 0)
        steps.append(first / (1 - beta1**count) / ((second / (1 - beta2**count)).sqrt() + eps))
    return steps


def _dot(a: _Gradient, b: _Gradient) -> float:
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _norm(a: _Gradient) -> float:
    return math.sqrt(_dot(a, a))


def _cosine(a: _Gradient, b: _Gradient) -> float:
    return _dot(a, b) / (_norm(a) * _norm(b))


def _degrees(a: _Gradient, b: _Gradient) -> float:
    return math.degrees(math.acos(max(-1.0, min(1.0, _cosine(a, b)))))
