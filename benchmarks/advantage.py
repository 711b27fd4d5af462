"""The advantage estimators against verl's, on the same tensors: ``python -m benchmarks.advantage``."""

from __future__ import annotations

import uuid

import numpy as np
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, compute_grpo_vectorized_outcome_advantage

from benchmarks._measure import medians, peak_bytes
from benchmarks._table import markdown, row
from hpo_plugin.algorithm import adaptive_alpha, count_signs, hysteretic_weights
from hpo_plugin.verl.estimators import estimator

RESPONSES, TOKENS, GROUP = 16384, 2048, 16
SCALING = ((1024, 512, 16), (4096, 512, 16), (4096, 2048, 16), (4096, 512, 4), (4096, 512, 64))
ALPHA, ALPHA_MIN = 0.6, 0.1


def batch(responses: int, tokens: int, group: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """A step as verl's trainer has it: the reward, 0 or 1, on the last token; an int64 mask; a uid a prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, tokens + 1, (responses, 1), generator=generator)
    mask = (torch.arange(tokens) < lengths).long()
    rewards = torch.zeros(responses, tokens)
    rewards.scatter_(1, lengths - 1, (torch.rand(responses, 1, generator=generator) < 0.2).float())
    uids = [str(uuid.UUID(int=i)) for i in range(-(-responses // group))]
    return rewards, mask, np.repeat(np.array(uids, dtype=object), group)[:responses]


def moving_the_bytes(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """No less can be done: read the rewards, read the mask, write a result into fresh memory (numpy's huge pages)."""
    rewards.sum(dim=-1)
    return torch.from_numpy(np.empty(mask.shape, dtype=np.float32)).copy_(mask)


def functions(responses: int, tokens: int, group: int) -> dict:
    """What is timed; ours apply α and count what is logged, so they do more than verl's."""
    rewards, mask, uids = batch(responses, tokens, group)
    config = OmegaConf.create(
        {
            "algorithm": {"norm_adv_by_std_in_grpo": True, "hpo": {"alpha": ALPHA, "alpha_min": ALPHA_MIN}},
            "actor_rollout_ref": {"rollout": {"n": group}},
        }
    ).algorithm
    return {
        "hpo": lambda: estimator("hpo")(rewards, mask, uids, config=config)[0],
        "ahpo": lambda: estimator("ahpo")(rewards, mask, uids, config=config)[0],
        "grpo": lambda: compute_grpo_outcome_advantage(rewards, mask, uids)[0],
        "grpo_vectorized": lambda: compute_grpo_vectorized_outcome_advantage(rewards, mask, uids)[0],
        "the bytes": lambda: moving_the_bytes(rewards, mask),
    }


def check(timed: dict) -> None:
    """Ours are verl's ``grpo`` with α applied to its negative rows; all have a first token."""
    grpo = timed["grpo"]()
    signs = grpo[:, 0].sign()
    for name, alpha in (("hpo", ALPHA), ("ahpo", adaptive_alpha(count_signs(signs), ALPHA_MIN))):
        expected = grpo * hysteretic_weights(signs, alpha).unsqueeze(-1)
        torch.testing.assert_close(timed[name](), expected, rtol=1e-5, atol=1e-6)


def run() -> list[dict]:
    """Speed and memory at 16,384 × 2,048, then seconds over rows, tokens and group sizes."""
    timed = functions(RESPONSES, TOKENS, GROUP)
    check(timed)
    seconds = medians(timed, seconds=8)
    size = RESPONSES * TOKENS * 4
    grpo, vectorized = seconds["grpo"], seconds["grpo_vectorized"]
    rows = [row(f"{name}, {RESPONSES} x {TOKENS}", seconds[name] * 1e3, "ms") for name in timed]
    for name in ("hpo", "ahpo"):
        rows += [
            row(f"{name}: faster than grpo", grpo / seconds[name], "times", at_least=10),
            row(f"{name}: faster than grpo_vectorized", vectorized / seconds[name], "times", at_least=1.5),
            row(f"{name}: peak memory beyond the result", peak_bytes(timed[name]) / size - 1, "results", at_most=0.05),
        ]
    peak = peak_bytes(timed["grpo_vectorized"]) / size - 1
    rows += [
        row("grpo_vectorized: peak memory beyond the result", peak, "results"),
        # fp32 rewards read, int64 mask read, fp32 result written.
        row("bytes that must move", (4 + 8 + 4) * RESPONSES * TOKENS / 2**20, "MiB"),
        row("ahpo: time over that of moving the bytes", seconds["ahpo"] / seconds["the bytes"], "times"),
        row("grpo_vectorized: time over that of moving the bytes", vectorized / seconds["the bytes"], "times"),
    ]
    for responses, tokens, group in SCALING:
        timed = functions(responses, tokens, group)
        check(timed)
        seconds = medians({name: timed[name] for name in ("ahpo", "grpo_vectorized")}, seconds=0.5)
        for name, value in seconds.items():
            rows.append(row(f"{name}, {responses} x {tokens}, groups of {group}", value * 1e3, "ms"))
    return rows


def main() -> None:
    """Print the table."""
    print(markdown(run()))


if __name__ == "__main__":
    main()
