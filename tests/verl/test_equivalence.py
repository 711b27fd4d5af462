"""One algorithm, whichever keys select it and however the batch is divided: the gradients are the same.

Every case goes through verl's real ``compute_advantage``, actor worker, FSDP2 engine and ``ppo_loss``
(``engine_harness.py``), on one and on two gloo ranks, and is compared with a reference that knows nothing of verl:
a plain model, a loop over groups, and :func:`hpo_plugin.algorithm.hpo_loss` on the whole mini-batch.

Scale factors on the way, and what they mirror in verl 0.9.1:

- token sum / ``batch_num_tokens`` × ``dp_size``: ``agg_loss``, token-mean (trainer/ppo/core_algos.py)
- mean of the gradients over ranks: FSDP's reduce-scatter
- ``batch_num_tokens`` over all ranks, per mini-batch: ``forward_backward_batch``
  (workers/engine/fsdp/transformer_impl.py)
"""

from __future__ import annotations

import os
import pickle
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_harness as harness
import numpy as np
import pytest
import torch
from engine_harness import Case

from hpo_plugin import algorithm

# The fixture starts verl in processes of its own and runs every case in them.
pytestmark = pytest.mark.timeout(1800)

KEYS = {
    "both": ("ahpo", "ahpo"),
    "estimator": ("ahpo", "vanilla"),
    "loss": ("grpo", "ahpo"),
    "both, fixed α": ("hpo", "hpo"),
    "estimator, fixed α": ("hpo", "vanilla"),
    "loss, fixed α": ("grpo_vectorized", "hpo"),
}
"""``adv_estimator`` and ``loss_mode``: the ways to select an algorithm."""

BASES = ("rloo", "rloo_vectorized", "opo", "gpg", "reinforce_plus_plus_baseline")
"""Estimators under ``loss_mode=ahpo``: theirs, then α."""

DIVISIONS: dict[str, dict[str, Any]] = {
    "whole": {"micro_batch_size": 12},
    "micro-batches of 1": {"micro_batch_size": 1},
    "micro-batches of 4": {"micro_batch_size": 4},
    "dynamic": {"max_tokens": 40},
    "permuted": {"permute": True},
    "padding": {"padding_rows": 8, "micro_batch_size": 4},
    "multi-turn": {"multi_turn": True, "max_tokens": 40},
    "multi-turn, permuted, padding": {"multi_turn": True, "permute": True, "padding_rows": 8},
    "mini-batches and epochs": {"mini_batches": 2, "epochs": 2, "max_tokens": 40},
    "mini-batches, padding": {"mini_batches": 3, "padding_rows": 6, "micro_batch_size": 1},
    "rollout correction": {"correction": True, "micro_batch_size": 4},
    "per-token advantages": {"per_token": True, "micro_batch_size": 4},
    "rejected": {"rejected": True, "micro_batch_size": 4},
    "a masked mini-batch": {"masked_mini_batch": True, "mini_batches": 2, "micro_batch_size": 2},
}

HARD = ("dynamic", "multi-turn, permuted, padding", "mini-batches and epochs", "rollout correction")
"""Divisions that every way to select an algorithm goes through; ``both`` goes through all."""


def _cases() -> list[Case]:
    cases = []
    for way, (adv_estimator, loss_mode) in KEYS.items():
        for division, settings in DIVISIONS.items():
            # The fixed α has no batch statistic to get wrong, and all share the way through the engine.
            if way != "both" and division not in HARD:
                continue
            if "fixed" in way and division != "mini-batches and epochs":
                continue
            hpo = {"alpha": 0.3} if "fixed" in way else {}
            cases.append(Case(f"{way} / {division}", adv_estimator, loss_mode, hpo=hpo, **settings))
    for base in BASES:
        settings = DIVISIONS["multi-turn, permuted, padding"] | {"micro_batch_size": 4}
        cases.append(Case(f"base {base}", base, "ahpo", **settings))
    cases += [
        Case("noise", "grpo", "ahpo", rewards="noisy", max_tokens=40),
        Case("noise, fixed α", "grpo", "hpo", rewards="noisy", max_tokens=40, hpo={"alpha": 0.3}),
        Case("α_min reached", hpo={"alpha_min": 0.5}),
        # Pairs: every four rows in a row happen to hold one positive and three negatives, as the batch does.
        Case("fault: micro-batch", micro_batch_size=2, fault="micro-batch"),
        Case("fault: twice", fault="twice"),
    ]
    return cases


CASES = {case.name: case for case in _cases()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(module: str, world: int, folder: Path, job: Any) -> Path:
    """Run ``main()`` of a harness in this folder as one process a rank; the path of what it writes."""
    job_file, out = folder / "job.pkl", folder / "out.pkl"
    job_file.write_bytes(pickle.dumps(job))
    port = _free_port()
    processes = []
    for rank in range(world):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "VERL_PLATFORM": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-c", f"import {module}; {module}.main()", str(job_file), str(out)]
        log = (folder / f"rank{rank}.log").open("w")
        here = Path(harness.__file__).parent
        processes.append(subprocess.Popen(command, cwd=here, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=1500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        tails = [(folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(world)]
        pytest.fail(f"exit status {codes}\n" + "\n".join(tails))
    return out


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases, run once per number of ranks in processes of their own."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    return pickle.loads(run_ranks("engine_harness", request.param, folder, list(CASES.values())).read_bytes())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("model")
    harness.build_model(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def plain_advantages(case: Case, batch: harness.Batch) -> list[float]:
    """Of each response, written as a loop over groups; equal rewards give 0, and so do fully masked rows."""
    lengths = batch.response_mask.sum(1).tolist()
    rows = list(zip(batch.rewards.tolist(), batch.uid, lengths, strict=True))
    nonzero = sum(reward != 0 for reward, _, length in rows if length)
    advantages = []
    for reward, uid, length in rows:
        group = [(r, t) for r, u, t in rows if u == uid and t]
        rewards = [r for r, _ in group]
        n, mean = len(group), statistics.mean(rewards) if rewards else 0.0
        if not length or len(set(rewards)) == 1:
            advantages.append(0.0)
        elif case.adv_estimator in ("rloo", "rloo_vectorized"):
            advantages.append((reward - mean) * n / (n - 1))
        elif case.adv_estimator == "opo":
            advantages.append(reward - sum(r * t for r, t in group) / sum(t for _, t in group))
        elif case.adv_estimator == "gpg":
            advantages.append((reward - mean) * sum(t > 0 for t in lengths) / nonzero)
        elif case.adv_estimator == "reinforce_plus_plus_baseline":
            advantages.append(reward - mean)
        else:
            advantages.append((reward - mean) / (statistics.stdev(rewards) + 1e-6))
    if case.adv_estimator == "reinforce_plus_plus_baseline":
        # Whitened over all tokens of the batch, with the unbiased variance (verl's masked_whiten).
        tokens = [a for a, t in zip(advantages, lengths, strict=True) for _ in range(t)]
        scale = (statistics.variance(tokens) + 1e-8) ** -0.5
        return [(a - statistics.mean(tokens)) * scale if t else 0.0 for a, t in zip(advantages, lengths, strict=True)]
    return advantages


def plain_alpha(case: Case, advantages: list[float]) -> float:
    """α written as a fraction of counts."""
    if "hpo" in (case.adv_estimator, case.loss_mode):
        return case.hpo["alpha"]
    ratio = sum(a > 0 for a in advantages) / sum(a < 0 for a in advantages)
    return min(1.0, max(case.hpo.get("alpha_min", 0.1), ratio))


def reference(case: Case, model: Any) -> list[dict[str, torch.Tensor]]:
    """Gradients of every optimizer step, from the whole mini-batch at once."""
    # What the result may not depend on is dropped here, so that cases which must agree share one reference.
    plain = replace(
        case,
        name="",
        adv_estimator=case.adv_estimator if case.adv_estimator in BASES else "",
        loss_mode="",
        micro_batch_size=None,
        max_tokens=0,
        permute=False,
        padding_rows=0,
        fault=None,
        hpo={},
    )
    key = (repr(plain), plain_alpha(case, [1.0, -1.0]) if "fixed" in case.name else tuple(case.hpo.items()))
    if key not in _references:
        _references[key] = _reference(case, model)
    return _references[key]


_references: dict[Any, list[dict[str, torch.Tensor]]] = {}


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a busy machine, the threads of a model this small wait for each other far longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def _reference(case: Case, model: Any) -> list[dict[str, torch.Tensor]]:
    import copy

    model = copy.deepcopy(model)
    batch = harness.make_batch(case)
    advantages = plain_advantages(case, batch)
    alpha = plain_alpha(case, advantages)
    tokens = torch.tensor(advantages).unsqueeze(1).expand(-1, harness.LONGEST)
    tokens = tokens * batch.tilt if case.per_token else tokens
    deal = harness.mini_batch_rows(replace(case, permute=False), len(advantages))
    gradients = []
    for _ in range(case.epochs):
        for rows in deal:
            log_probs = torch.zeros(len(rows), harness.LONGEST)
            for k, i in enumerate(rows):
                prompt, length = batch.prompts[i], int(batch.lengths[i])
                ids = torch.cat([prompt, batch.responses[i, :length]])
                every = torch.log_softmax(model(ids.unsqueeze(0)).logits[0], dim=-1)
                start = len(prompt) - 1
                log_probs[k, :length] = every[start : start + length].gather(-1, ids[len(prompt) :, None])[:, 0]
            mask = batch.response_mask[rows].bool()
            if case.correction:
                # Rollout correction multiplies the loss of a token.
                signs = algorithm.response_signs(tokens[rows], mask)
                surrogate = algorithm.clipped_surrogate(
                    log_probs, batch.old_log_probs[rows], tokens[rows], clip_low=0.2, clip_high=0.2
                )
                weights = algorithm.hysteretic_weights(signs, alpha).unsqueeze(1) * batch.rollout_is_weights[rows]
                loss = (surrogate.loss * weights * mask).sum() / mask.sum()
            else:
                loss = algorithm.hpo_loss(log_probs, batch.old_log_probs[rows], tokens[rows], mask, alpha=alpha)
            # L̄ is the mean length of what was generated: verl does not take rejected tokens out of it.
            loss = loss * mask.sum() / batch.loss_mask[rows].sum().clamp(min=1)
            model.zero_grad()
            loss.backward()
            gradients.append({name: value.grad.clone() for name, value in model.named_parameters()})
            with torch.no_grad():
                for value in model.parameters():
                    value -= 0.5 * value.grad
    return gradients


def relative_error(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> float:
    """The largest difference of any gradient entry of any optimizer step, over the step's largest entry."""
    assert len(ours) == len(theirs)
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert set(a) == set(b)
        scale = max(float(value.abs().max()) for value in b.values()) or 1.0
        worst = max(worst, *(float((a[name] - b[name]).abs().max()) / scale for name in b))
    return worst


SOUND = [name for name in CASES if not name.startswith("fault")]


@pytest.mark.parametrize("name", SOUND)
def test_gradient_is_that_of_the_whole_batch(results: dict[str, Any], model: Any, name: str) -> None:
    """J does not depend on the keys, micro-batches, ranks, order, padding: to float tolerance."""
    error = relative_error(results[name]["gradients"], reference(CASES[name], model))
    assert error < 2e-5, f"relative error {error:.1e}"


def test_every_way_to_select_the_algorithm_gives_the_same_gradients(results: dict[str, Any]) -> None:
    """Directly against each other, over all hard divisions of the batch."""
    for division in HARD:
        loss = results[f"loss / {division}"]["gradients"]
        for other in ("estimator", "both"):
            assert relative_error(results[f"{other} / {division}"]["gradients"], loss) < 2e-5, (division, other)


def test_the_batch_really_was_divided(results: dict[str, Any]) -> None:
    """Otherwise invariance would be proved of nothing."""
    assert results["both / micro-batches of 1"]["micro_batches"] > results["both / micro-batches of 4"]["micro_batches"]
    assert results["both / dynamic"]["micro_batches"] > 1
    assert len(results["both / mini-batches and epochs"]["gradients"]) == 4
    assert len(results["both / mini-batches, padding"]["gradients"]) == 3


def test_where_no_token_of_a_mini_batch_is_unmasked_the_gradient_is_zero(results: dict[str, Any]) -> None:
    first, second = results["both / a masked mini-batch"]["gradients"]
    assert max(float(value.abs().max()) for value in first.values()) > 0
    assert all(torch.equal(value, torch.zeros_like(value)) for value in second.values())


@pytest.mark.parametrize("fault", ["micro-batch", "twice"])
def test_a_wrong_alpha_would_be_seen(results: dict[str, Any], model: Any, fault: str) -> None:
    """The same comparison fails by orders of magnitude when α is the micro-batch's, or is applied twice."""
    case = CASES[f"fault: {fault}"]
    assert relative_error(results[case.name]["gradients"], reference(case, model)) > 1e-2


WHOLE = [name for name in SOUND if name.startswith(("both /", "estimator /", "loss /", "noise"))]


@pytest.mark.parametrize("name", [n for n in WHOLE if "rejected" not in n and "masked" not in n and "fixed" not in n])
def test_alpha_and_shares_are_those_of_the_whole_batch(results: dict[str, Any], name: str) -> None:
    """3 of 24 positive, 9 of 24 negative: α = 1/3; two of four groups degenerate; padding counts nowhere."""
    driver = results[name]["driver"]
    assert driver["actor/hpo/alpha"] == pytest.approx(1 / 3)
    assert driver["actor/hpo/share_positive"] == pytest.approx(3 / 24)
    assert driver["actor/hpo/share_negative"] == pytest.approx(9 / 24)
    assert driver["actor/hpo/share_degenerate_groups"] == pytest.approx(2 / 4)
    batch = harness.make_batch(CASES[name])
    assert driver["actor/hpo/response_length"] == pytest.approx(float(batch.response_mask.sum()) / 24)


@pytest.mark.parametrize("name", ["noise", "noise, fixed α"])
def test_equal_rewards_have_advantages_of_exactly_zero(results: dict[str, Any], name: str) -> None:
    """0.9 six times gives −0.056 each in verl's ``grpo``, 0.3 gives +0.029."""
    assert not results[name]["advantages"][12:].any()
    assert results[name]["advantages"][:12].any()


def test_the_loss_in_the_log_does_not_depend_on_the_division(results: dict[str, Any]) -> None:
    """Verl adds ``actor/pg_loss`` up over micro-batches, and averages what the policy loss returns beside it."""
    whole = results["both / whole"]["metrics"]
    assert float(np.mean(whole["actor/pg_clipfrac"])) > 0.01  # the batch does exercise the clip
    for division in ("micro-batches of 1", "micro-batches of 4", "dynamic", "permuted", "padding"):
        metrics = results[f"both / {division}"]["metrics"]
        assert float(np.mean(metrics["actor/pg_loss"])) == pytest.approx(
            float(np.mean(whole["actor/pg_loss"])), rel=1e-4
        )
        assert set(metrics) == set(whole)


def test_alpha_never_falls_below_its_limit(results: dict[str, Any]) -> None:
    """α_min = 0.5 where the ratio is 1/3."""
    assert results["α_min reached"]["driver"]["actor/hpo/alpha"] == pytest.approx(0.5)
