"""Bad input to the algorithm: generated batches, compared with an oracle in plain Python.

:func:`batch` draws a batch from a random generator. The functions ``check_*`` pass it through one interface and return
what is wrong, one line each. The oracle uses fractions and Python floats, and none of the code under test.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpo_plugin import fused
from hpo_plugin.algorithm import (
    HystereticAdvantage,
    RewardError,
    SignCounts,
    adaptive_alpha,
    hpo_loss,
    hysteretic_advantage,
)
from hpo_plugin.metrics import step_metrics
from torture.probe import Probe, Result

#: ε of the standard deviation, the largest reward, and the tolerance for equal rewards, from the documentation.
EPSILON, LARGEST, EQUAL = 1e-6, 1e12, Fraction(8, 2**23)
#: Relative tolerances of advantages, of sums over tokens in fp32, and of gradients in the dtype of the log-probs.
ADVANTAGE, SUM = 1e-6, 1e-5
GRADIENT = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}

REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DISCRETE = (torch.int64, torch.int32, torch.bool)
MASKS = (torch.int64, torch.bool, torch.float32, torch.int32, torch.uint8, torch.bfloat16)

#: Rewards of one batch; a batch draws from one of these.
REWARDS: dict[str, tuple[float, ...]] = {
    "binary": (0.0, 1.0),
    "sparse": (0.0,) * 7 + (1.0,),
    "equal": (0.1,),
    "zero": (0.0,),
    "graded": (-1.0, -0.5, 0.1, 0.2, 0.3, 0.4, 0.7, 1.0),
    "nearly equal": (1.0, 1.0 + 2**-23, 1.0001),
    "large": (9.9e11, -9.9e11, 1e9, 0.0),
    "tiny": (1e-30, -1e-30, 0.0, 3e-30),
    "mixed sizes": (1e11, 1.0, 1e-6, 0.0),
    "nan": (math.nan, 0.0, 0.0, 1.0),
    "infinite": (math.inf, -math.inf, 0.0, 1.0, 0.5, 0.0),
    "too large": (1e13, 0.0, 1.0),
    "overflow of fp32 squares": (1e30, -1e30, 0.0),
    "overflow of fp32 sums": (3e38, -3e38, 0.0),
    "overflow of fp64": (1e308, -1e308, 1e200, 0.0),
}

#: Log-ratios of tokens: near 0, next to both clips, next to ±20, and far outside.
LOG_RATIOS = torch.tensor(
    [0.0, 1e-3, -1e-3, 0.1, -0.1, 0.5, -0.5, 1.5, -3.0, 19.5, -19.5, 20.5, -20.5, 300.0, -300.0, 1e4, -1e4],
    dtype=torch.float64,
)


@dataclass
class Batch:
    """A rollout batch.

    Attributes:
        rewards: (N,) of any dtype, not always contiguous.
        groups: (N,) int64.
        mask: (N, T) of 0 and 1, any dtype.
        log_prob: (N, T) floating point.
        old: (N, T) floating point.
        clips: ε_lo, ε_hi and c, or None.
        alpha_min: α_min.
        by_std: whether advantages are divided by the standard deviation.
        uids: (N,) array, which names the groups.
        garbage: value outside the mask.
        rng: the generator for further choices.
    """

    rewards: Tensor
    groups: Tensor
    mask: Tensor
    log_prob: Tensor
    old: Tensor
    clips: tuple[float, float, float | None]
    alpha_min: float
    by_std: bool
    uids: np.ndarray
    garbage: float
    rng: random.Random

    @property
    def inside(self) -> Tensor:
        """(N, T) bool."""
        return self.mask.bool()

    @property
    def valid(self) -> list[bool]:
        """Whether each response has a token."""
        return self.inside.any(dim=1).tolist()

    @property
    def bad_rows(self) -> list[int]:
        """Rows of valid responses whose reward is documented as an error."""
        values = self.rewards.double().tolist()
        return [row for row, ok in enumerate(self.valid) if ok and not abs(values[row]) <= LARGEST]

    def rule(self, counts: SignCounts) -> Tensor:
        """A-HPO's rule."""
        return adaptive_alpha(counts, self.alpha_min)


def strided(x: Tensor, rng: random.Random) -> Tensor:
    """The same values, half of the time in a layout that is not contiguous."""
    if rng.random() < 0.5:
        return x
    wide = torch.stack([x, x], dim=-1)[..., 0]
    return wide if x.dim() == 1 or rng.random() < 0.5 else wide.t().contiguous().t()


def batch(rng: random.Random, *, dtypes: Sequence[torch.dtype] = REAL + DISCRETE, least: int = 0) -> Batch:
    """Draw a batch.

    Args:
        rng: source of all choices.
        dtypes: dtypes of the rewards.
        least: smallest number of rows.
    """
    n = max(least, rng.choice((0, 1, 2, 3, 4, 8, 16, 24)))
    t = rng.choice((1, 1, 2, 5, 12))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    grouping = rng.choice(("one", "single", "consecutive", "any"))
    group_of = {
        "one": lambda row: 0,
        "single": lambda row: row,
        "consecutive": lambda row: row // 4,
        "any": lambda row: rng.randrange(max(n // 3, 1)),
    }[grouping]
    groups = [group_of(row) for row in range(n)]
    kind = rng.choice(list(REWARDS))
    rewards = torch.tensor([rng.choice(REWARDS[kind]) for _ in range(n)], dtype=torch.float64)
    dtype = rng.choice(list(dtypes))
    rewards = rewards.clamp(-1e9, 1e9).nan_to_num(0.0).to(dtype) if dtype in DISCRETE else rewards.to(dtype)

    masking = rng.choice(("full", "lengths", "holes", "one token", "nothing"))
    positions = torch.arange(t).expand(n, t)
    lengths = torch.randint(0 if rng.random() < 0.5 else 1, t + 1, (n, 1), generator=generator)
    inside = {
        "full": lambda: positions >= 0,
        "lengths": lambda: positions < lengths,
        "holes": lambda: torch.rand(n, t, generator=generator) < 0.5,
        "one token": lambda: positions < 1,
        "nothing": lambda: positions < 0,
    }[masking]()

    garbage = rng.choice((0.0, math.nan, math.inf, -math.inf))
    at = torch.randint(0, len(LOG_RATIOS), (n, t), generator=generator)
    old = (-3 * torch.rand(n, t, generator=generator, dtype=torch.float64)).to(rng.choice(REAL))
    log_prob = (old.double() + LOG_RATIOS[at]).to(rng.choice(REAL))
    old, log_prob = (torch.where(inside, x, garbage) for x in (old, log_prob))
    name: Callable[[int], Any] = rng.choice((str, int, lambda group: f"prompt {group}\n", lambda group: (group, "u")))
    uids = np.empty(n, dtype=object)
    uids[:] = [name(group) for group in groups] if name(0) != (0, "u") else [str(name(group)) for group in groups]
    if rng.random() < 0.3:
        uids = np.array([name(group) for group in groups]) if name in (str, int) else uids
    return Batch(
        rewards=strided(rewards, rng),
        groups=strided(torch.tensor(groups, dtype=torch.int64), rng),
        mask=strided(inside.to(rng.choice(MASKS)), rng),
        log_prob=strided(log_prob, rng),
        old=strided(old, rng),
        clips=(0.2, rng.choice((0.2, 0.28)), rng.choice((3.0, None))),
        alpha_min=rng.choice((0.1, 0.0, 1.0)),
        by_std=rng.random() < 0.7,
        uids=uids,
        garbage=garbage,
        rng=rng,
    )


# --- the oracle ----------------------------------------------------------------------------------------------------


def advantages_of(
    rewards: Sequence[float], groups: Sequence[int], valid: Sequence[bool], *, by_std: bool
) -> tuple[list[float], list[bool]]:
    """A_i of each response, and whether all valid rewards of its group are equal up to rounding."""
    advantages, degenerate = [0.0] * len(rewards), [False] * len(rewards)
    for group in set(groups):
        rows = [row for row, of in enumerate(groups) if of == group and valid[row]]
        if not rows:
            continue
        values = [Fraction(rewards[row]) for row in rows]
        mean, tolerance = sum(values, Fraction()) / len(values), EQUAL * max(abs(value) for value in values)
        centered = [value - mean if abs(value - mean) > tolerance else Fraction(0) for value in values]
        spread = 1.0
        if by_std:
            spread = math.sqrt(sum(c * c for c in centered) / max(len(rows) - 1, 1)) + EPSILON
        for row, c in zip(rows, centered, strict=True):
            advantages[row], degenerate[row] = float(c) / spread, not any(centered)
    return advantages, degenerate


def alpha_of(positive: int, negative: int, alpha_min: float) -> float:
    """α of A-HPO."""
    return min(max(positive / negative, alpha_min), 1.0) if negative else 1.0


def loss_of(
    log_prob: Tensor, old: Tensor, advantages: Sequence[float], inside: Tensor, clips: tuple[float, float, float | None]
) -> tuple[float, float, list[list[tuple[float, float]]]]:
    """The loss over the number of tokens, the sum of the magnitudes of its terms, and the gradient.

    Returns:
        The gradient of each token is the interval of the values that are right: a point, except next to a clip.
    """
    low, high, dual = clips
    tokens = max(int(inside.sum()), 1)
    loss = size = 0.0
    gradient = []
    for new_row, old_row, a, mask_row in zip(log_prob.tolist(), old.tolist(), advantages, inside.tolist(), strict=True):
        row = []
        for new, before, counted in zip(new_row, old_row, mask_row, strict=True):
            if not counted:
                row.append((0.0, 0.0))
                continue
            x = min(max(new - before, -20.0), 20.0)
            ratio = math.exp(x)
            value = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            if dual is not None and a < 0:
                value = max(value, dual * a)
            slope = ratio * a if value == ratio * a and x == new - before else 0.0
            kinks = [math.log(k) for k in (1 - low, 1 + high, dual) if k] + [20.0, -20.0]
            near = any(abs(new - before - kink) < 1e-4 for kink in kinks)
            ends = (0.0, -ratio * a / tokens) if near else (-slope / tokens, -slope / tokens)
            row.append((min(ends), max(ends)))
            loss, size = loss - value / tokens, size + abs(value) / tokens
        gradient.append(row)
    return loss, size, gradient


def differs(found: float, expected: float, tolerance: float, scale: float = 0.0) -> bool:
    """Whether a number is wrong, or is zero or NaN where the expected one is not."""
    return not abs(found - expected) <= tolerance * max(abs(expected), scale)


def wrong_gradient(name: str, gradient: Tensor | None, expected: list[list[tuple[float, float]]]) -> list[str]:
    """Compare a gradient with the intervals of :func:`loss_of`."""
    assert gradient is not None
    if bool(gradient.isnan().any()):
        return [f"{name}: the gradient is NaN"]
    # Beyond the range of its dtype, fp16 for example, a gradient is infinite.
    tolerance, tiny, most = GRADIENT[gradient.dtype], torch.finfo(gradient.dtype).tiny, torch.finfo(gradient.dtype).max
    found = gradient.clamp(-most, most).tolist()
    wrong = [
        f"{name}: the gradient at {row}, {column} is {x}, not in [{low}, {high}]"
        for row, (found_row, expected_row) in enumerate(zip(found, expected, strict=True))
        for column, (x, ends) in enumerate(zip(found_row, expected_row, strict=True))
        for low, high in [[min(max(end, -most), most) for end in ends]]
        if not low - tolerance * abs(low) - tiny <= x <= high + tolerance * abs(high) + tiny
    ]
    return wrong[:1]


def wrong_advantages(b: Batch, weighted: Sequence[float], alpha: float, metrics: dict[str, float]) -> list[str]:
    """Compare weighted advantages, α and metrics with the oracle; ``metrics`` have no prefix but ``hpo/``."""
    valid, lengths = b.valid, b.inside.sum(dim=1).tolist()
    plain, degenerate = advantages_of(b.rewards.double().tolist(), b.groups.tolist(), valid, by_std=b.by_std)
    positive, negative = sum(a > 0 for a in plain), sum(a < 0 for a in plain)
    expected_alpha = alpha_of(positive, negative, b.alpha_min)
    expected = [expected_alpha * a if a < 0 else a for a in plain]
    wrong = [
        f"row {row}: weighted advantage {found}, not {right}"
        for row, (found, right) in enumerate(zip(weighted, expected, strict=True))
        if differs(found, right, ADVANTAGE)
    ]
    if differs(alpha, expected_alpha, 1e-6):
        wrong.append(f"α is {alpha}, not {expected_alpha}")
    groups = b.groups.tolist()
    all_groups = {group for group, ok in zip(groups, valid, strict=True) if ok}
    no_signal = {group for group, ok in zip(groups, degenerate, strict=True) if ok}
    responses = max(sum(valid), 1)
    sizes = [sum(n * abs(a) for n, a in zip(lengths, expected, strict=True) if a * sign > 0) for sign in (1, -1)]
    named = {
        "hpo/alpha": expected_alpha,
        "hpo/share_positive": positive / responses,
        "hpo/share_negative": negative / responses,
        "hpo/response_length": sum(lengths) / responses,
        "hpo/abs_advantage_share_positive": sizes[0] / sum(sizes) if sum(sizes) else 0.0,
        "hpo/abs_advantage_share_negative": sizes[1] / sum(sizes) if sum(sizes) else 0.0,
    }
    if all_groups:
        named["hpo/share_degenerate_groups"] = len(no_signal) / len(all_groups)
    if metrics.keys() != named.keys():
        wrong.append(f"metrics {sorted(metrics)}, not {sorted(named)}")
    else:
        wrong += [f"{k} is {metrics[k]}, not {v}" for k, v in named.items() if differs(metrics[k], v, SUM)]
    return wrong[:2]


# --- the functions of the algorithm --------------------------------------------------------------------------------


def check_functions(b: Batch) -> list[str]:
    """The pure functions: advantages, α, statistics, loss and gradient of a batch."""
    rng = b.rng
    valid: Tensor | None = b.inside.any(dim=1).to(rng.choice((torch.bool, torch.int64, torch.float32)))
    if all(b.valid) and rng.random() < 0.5:
        valid = None
    rewards = b.rewards
    if rewards.is_floating_point() and rng.random() < 0.3:
        rewards = rewards.clone().requires_grad_()
    lengths = b.inside.sum(dim=1)
    try:
        result = hysteretic_advantage(
            rewards,
            b.groups,
            b.rule,
            valid=valid,
            magnitude=rewards.abs() if rewards.dtype != torch.bool and rng.random() < 0.5 else None,
            lengths=lengths if rng.random() < 0.5 else lengths.float(),
            normalize_by_std=b.by_std,
        )
    except RewardError as error:
        return [] if error.rows == b.bad_rows else [f"RewardError for rows {error.rows}, not {b.bad_rows}"]
    if b.bad_rows:
        return [f"no error for the rewards of rows {b.bad_rows}"]
    if result.weighted.requires_grad or result.advantage.requires_grad:
        return ["an advantage requires a gradient"]
    wrong = wrong_advantages(
        b, result.weighted.tolist(), float(result.alpha), step_metrics([result.statistics])
    ) + check_base(b, result)
    return wrong or check_losses(b, result)


def check_base(b: Batch, own: HystereticAdvantage) -> list[str]:
    """Advantages of another estimator: all positive, all negative, mixed, or not finite in one valid row."""
    rng, valid = b.rng, b.valid
    n = len(valid)
    kind = rng.choice(("positive", "negative", "mixed", "zero", "nan"))
    values = {"positive": (1.0, 0.5), "negative": (-1.0, -0.5), "mixed": (1.0, -1.0, 0.0), "zero": (0.0,)}
    plain = [rng.choice(values.get(kind, (1.0, -0.5))) for _ in range(n)]
    broken = [row for row in range(n) if kind == "nan" and rng.random() < 0.3]
    for row in broken:
        plain[row] = rng.choice((math.nan, math.inf, -math.inf))
    per_token = rng.random() < 0.5
    base = torch.tensor(plain).to(rng.choice(REAL))
    if per_token:
        base = torch.where(b.inside, base.unsqueeze(1), 0.0)
    seen: list[SignCounts] = []

    def rule(counts: SignCounts) -> Tensor:
        seen.append(counts)
        return b.rule(counts)

    try:
        result = hysteretic_advantage(
            b.rewards,
            b.groups,
            rule,
            valid=b.inside.any(dim=1),
            base=base,
            base_is_zero_without_signal=False,
        )
    except ValueError as error:
        wanted = [row for row in broken if valid[row]]
        return [] if wanted and f"rows {wanted[:8]}" in str(error) else [f"base {plain}: {error}"]
    if any(valid[row] for row in broken):
        return [f"no error for the base {plain}"]
    counted = [a for a, ok in zip(plain, valid, strict=True) if ok]
    numbers = [sum(a > 0 for a in counted), sum(a < 0 for a in counted), len(counted)]
    if [int(number) for number in seen[0]] != numbers:
        return [f"base {plain}: counts {seen[0]}, not {numbers}"]
    alpha = alpha_of(numbers[0], numbers[1], b.alpha_min)
    found = result.weighted.sum(dim=1) / b.inside.sum(dim=1).clamp(min=1) if per_token else result.weighted
    expected = [(alpha * a if a < 0 else a) if ok else 0.0 for a, ok in zip(plain, valid, strict=True)]
    return [
        f"base {a}: weighted {x}, not {y}"
        for a, x, y in zip(plain, found.tolist(), expected, strict=True)
        if differs(x, y, ADVANTAGE)
    ][:1]


def check_losses(b: Batch, result: HystereticAdvantage) -> list[str]:
    """`hpo_loss` and the fused loss: value and gradient, with garbage outside the mask."""
    rng, inside, wrong = b.rng, b.inside, []
    low, high, dual = b.clips
    clips: dict[str, Any] = {"clip_low": low, "clip_high": high, "clip_dual": dual}
    tokens = max(int(inside.sum()), 1)
    dtype = rng.choice((result.weighted.dtype, torch.float64))
    alpha = float(result.alpha)

    def spread(values: Tensor) -> Tensor:
        return torch.where(inside, values.to(dtype).unsqueeze(1), b.garbage)

    weighted = result.weighted.to(dtype).tolist()
    loss, size, gradient = loss_of(b.log_prob, b.old, weighted, inside, b.clips)

    def compare(name: str, function: Callable[[Tensor], Tensor]) -> None:
        log_prob = b.log_prob.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        found = function(log_prob)
        if differs(found.item(), loss, SUM, size):
            wrong.append(f"{name}: the loss is {found.item()}, not {loss}")
        found.backward()
        wrong.extend(wrong_gradient(name, log_prob.grad, gradient))

    mask = b.mask
    compare("hpo_loss", lambda x: hpo_loss(x, b.old, spread(result.advantage), mask, alpha=alpha, **clips))
    compare(
        "surrogate_loss",
        lambda x: fused.surrogate_loss(x, b.old, spread(result.weighted), mask, scale=1 / tokens, **clips)[0],
    )
    differentiable = spread(result.weighted).requires_grad_()
    compare(
        "surrogate_loss with differentiable advantages",
        lambda x: fused.surrogate_loss(x, b.old, differentiable, mask, scale=1 / tokens, **clips)[0],
    )
    assert differentiable.grad is not None
    if not bool(differentiable.grad.isfinite().all()):
        wrong.append("the gradient of the advantages is not finite")
    return wrong


# --- OpenRLHF ------------------------------------------------------------------------------------------------------


def check_openrlhf(b: Batch, estimate: Callable[[list[Any]], list[Any]] | None = None) -> list[str]:
    """`apply_alpha` on OpenRLHF's advantages of a batch, in micro-batches of any rows.

    OpenRLHF has one number of responses for all prompts. It keeps responses without a token in the mean of their group,
    and adds 1e-9 to the standard deviation.

    Args:
        b: the batch.
        estimate: OpenRLHF's method, which adds the advantages to its experiences; OpenRLHF's formula if None.
    """
    from hpo_plugin.openrlhf.experience import apply_alpha

    rng, size = b.rng, 4
    n = len(b.rewards) // size * size
    if not n:
        return []
    rewards, inside = b.rewards[:n].float(), b.inside[:n]
    grouped = rewards.view(-1, size)
    theirs = ((grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(-1, keepdim=True) + 1e-9)).flatten()
    order = list(range(n))
    rng.shuffle(order)
    # OpenRLHF's advantages have the dtype of its rewards, and are 0 outside the mask, except before the last token.
    full = torch.where(inside, theirs.unsqueeze(1), 0.0)
    full[:, 0] = theirs
    experiences: list[Any] = [
        SimpleNamespace(
            index=rows, action_mask=b.mask[rows], rewards=rewards[rows], advantages=full[rows].clone(), info={}
        )
        for rows in (order[i : i + size] for i in range(0, n, size))
    ]
    if estimate is not None:
        experiences = estimate(experiences)
        for experience in experiences:
            theirs[experience.index] = experience.advantages[:, 0]
    values = rewards.double().tolist()
    bad = [row for row in range(n) if not abs(values[row]) <= LARGEST]
    try:
        metrics = apply_alpha(experiences, size, b.rule)
    except RewardError as error:
        return [] if error.rows == bad else [f"RewardError for rows {error.rows}, not {bad}"]
    if bad:
        return [f"no error for the rewards of rows {bad}"]
    valid = inside.any(dim=1).tolist()
    exact, _ = advantages_of(values, [row // size for row in range(n)], [True] * n, by_std=False)
    # Next to the tolerance for equal rewards, fp32 decides the sign of OpenRLHF's advantages.
    plain = [a if e and ok else 0.0 for a, e, ok in zip(theirs.tolist(), exact, valid, strict=True)]
    positive, negative = sum(a > 0 for a in plain), sum(a < 0 for a in plain)
    alpha = alpha_of(positive, negative, b.alpha_min)
    wrong = []
    if differs(metrics["hpo/alpha"], alpha, 1e-6) or not all(map(math.isfinite, metrics.values())):
        wrong.append(f"metrics {metrics}, α = {alpha}")
    for experience in experiences:
        for row, found, mask in zip(experience.index, experience.advantages, experience.action_mask, strict=True):
            right = plain[row] * (alpha if plain[row] < 0 else 1)
            if any(
                differs(a, right if token else 0.0, ADVANTAGE) for a, token in zip(found.tolist(), mask, strict=True)
            ):
                wrong.append(f"row {row}: {found.tolist()}, not {right}")
        if experience.info.keys() != metrics.keys():
            wrong.append(f"logged {sorted(experience.info)}, not {sorted(metrics)}")
    return wrong[:2]


# --- probes --------------------------------------------------------------------------------------------------------


def many(check: Callable[[Batch], list[str]], batches: int, seed: int, folder: Path, **options: Any) -> Result:
    """Draw batches and check each.

    Args:
        check: returns what is wrong with a batch.
        batches: how many.
        seed: seed of the first batch; each has its own seed, which a failure names.
        folder: not used.
        options: arguments of :func:`batch`.
    """
    torch.set_num_threads(1)
    result = Result()
    for number in range(seed, seed + batches):
        b = batch(random.Random(number), **options)
        result.inputs += 1
        result.count("batches with a reward that is an error" if b.bad_rows else "batches with a result")
        try:
            wrong = check(b)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        result.failures += [f"seed {number}: {line}" for line in wrong]
        if len(result.failures) > 20:
            break
    return result


#: Batches of a case.
BATCHES = 15_000
EXPECTED = "the oracle's result, or an error that names the rows"

PROBES: tuple[Probe, ...] = (
    Probe(
        "algorithm-functions",
        "algorithm-inputs",
        "batches for the functions of the algorithm",
        EXPECTED,
        {f"part-{k}": partial(many, check_functions, BATCHES, k * BATCHES) for k in range(4)},
    ),
    Probe(
        "algorithm-openrlhf",
        "algorithm-inputs",
        "batches for the adapter to OpenRLHF, with OpenRLHF's formula of advantages",
        "the oracle's advantages and α, or an error that names the rows",
        {"all": partial(many, check_openrlhf, BATCHES, 0, least=4)},
    ),
)
