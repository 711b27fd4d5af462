"""One algorithm, however it is entered and however the batch is cut: the gradients are the same.

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_harness as harness
import pytest
import torch
from engine_harness import Case

from hpo_plugin import algorithm

# The fixture starts verl in processes of its own and runs every case in them.
pytestmark = pytest.mark.timeout(1800)

ENTRANCES = {
    "both": ("ahpo", "ahpo"),
    "advantage": ("ahpo", "vanilla"),
    "loss": ("grpo", "ahpo"),
    "both, fixed α": ("hpo", "hpo"),
    "advantage, fixed α": ("hpo", "vanilla"),
    "loss, fixed α": ("grpo", "hpo"),
}

CUTS: dict[str, dict[str, Any]] = {
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
}

FULL = ("both",)
"""Entrances that go through every cut."""

HARD = ("dynamic", "multi-turn, permuted, padding", "mini-batches and epochs", "rollout correction")
"""Cuts that every entrance goes through."""


def _cases() -> list[Case]:
    cases = []
    for entrance, (adv_estimator, loss_mode) in ENTRANCES.items():
        for cut, settings in CUTS.items():
            # The fixed α has no batch statistic to get wrong, and the entrances share the way through the engine.
            if entrance not in FULL and cut not in HARD:
                continue
            if "fixed" in entrance and cut != "mini-batches and epochs":
                continue
            hpo = {"alpha": 0.3} if "fixed" in entrance else {}
            cases.append(Case(f"{entrance} / {cut}", adv_estimator, loss_mode, hpo=hpo, **settings))
    cases += [
        Case("noise", "grpo", "ahpo", rewards="noisy", max_tokens=40),
        Case("noise, fixed α", "grpo", "hpo", rewards="noisy", max_tokens=40),
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


def _run(world: int, folder: Path) -> dict[str, Any]:
    cases = folder / "cases.pkl"
    cases.write_bytes(pickle.dumps(list(CASES.values())))
    port = _free_port()
    processes = []
    for rank in range(world):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "VERL_PLATFORM": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        program = "import engine_harness; engine_harness.main()"
        command = [sys.executable, "-c", program, str(cases), str(folder / "out.pkl")]
        log = (folder / f"rank{rank}.log").open("w")
        processes.append(
            subprocess.Popen(
                command, cwd=Path(harness.__file__).parent, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        )
    try:
        codes = [process.wait(timeout=1500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        tails = [(folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(world)]
        pytest.fail(f"exit status {codes}\n" + "\n".join(tails))
    return pickle.loads((folder / "out.pkl").read_bytes())


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases, run once per number of ranks in processes of their own."""
    return _run(request.param, tmp_path_factory.mktemp(f"ranks{request.param}"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("model")
    harness.build_model(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def plain_advantages(batch: harness.Batch) -> list[float]:
    """GRPO's, written as a loop; groups whose rewards are all equal get 0."""
    advantages = []
    for reward, uid in zip(batch.rewards.tolist(), batch.uid, strict=True):
        group = [r for r, u in zip(batch.rewards.tolist(), batch.uid, strict=True) if u == uid]
        equal = len(set(group)) == 1
        advantages.append(0.0 if equal else (reward - statistics.mean(group)) / (statistics.stdev(group) + 1e-6))
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
        adv_estimator=case.loss_mode if case.loss_mode != "vanilla" else case.adv_estimator,
        loss_mode="",
        micro_batch_size=None,
        max_tokens=0,
        permute=False,
        padding_rows=0,
        fault=None,
        hpo={},
    )
    key = (repr(plain), tuple(case.hpo.items()))
    if key not in _references:
        _references[key] = _reference(case, model)
    return _references[key]


_references: dict[Any, list[dict[str, torch.Tensor]]] = {}


def _reference(case: Case, model: Any) -> list[dict[str, torch.Tensor]]:
    import copy

    model = copy.deepcopy(model)
    batch = harness.make_batch(case)
    advantages = plain_advantages(batch)
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
        scale = max(float(value.abs().max()) for value in b.values())
        worst = max(worst, *(float((a[name] - b[name]).abs().max()) / scale for name in b))
    return worst


SOUND = [name for name in CASES if not name.startswith(("fault", "noise"))]


@pytest.mark.parametrize("name", SOUND)
def test_gradient_is_that_of_the_whole_batch(results: dict[str, Any], model: Any, name: str) -> None:
    """J does not depend on the entrance, micro-batches, ranks, order, padding: to float tolerance."""
    error = relative_error(results[name]["gradients"], reference(CASES[name], model))
    assert error < 2e-5, f"relative error {error:.1e}"


def test_both_entrances_give_the_same_gradients(results: dict[str, Any]) -> None:
    """The two directly against each other, over all cuts of the batch."""
    for cut in HARD:
        loss = results[f"loss / {cut}"]["gradients"]
        for other in ("advantage", "both"):
            assert relative_error(results[f"{other} / {cut}"]["gradients"], loss) < 2e-5, (cut, other)


def test_the_batch_really_was_cut(results: dict[str, Any]) -> None:
    """Otherwise invariance would be proved of nothing."""
    assert results["both / micro-batches of 1"]["micro_batches"] > results["both / micro-batches of 4"]["micro_batches"]
    assert results["both / dynamic"]["micro_batches"] > 1
    assert len(results["both / mini-batches and epochs"]["gradients"]) == 4
    assert len(results["both / mini-batches, padding"]["gradients"]) == 3


def test_alpha_from_the_micro_batch_would_be_seen(results: dict[str, Any], model: Any) -> None:
    """The same comparison fails by orders of magnitude when α is taken from the micro-batch."""
    case = CASES["fault: micro-batch"]
    assert relative_error(results[case.name]["gradients"], reference(case, model)) > 1e-2


def test_weighing_twice_would_be_seen(results: dict[str, Any], model: Any) -> None:
    """Hysteresis is applied exactly once: twice is visible."""
    case = CASES["fault: twice"]
    assert relative_error(results[case.name]["gradients"], reference(case, model)) > 1e-2


def _value(metrics: dict[str, Any], key: str) -> float:
    (value,) = metrics[key]
    return float(value)


@pytest.mark.parametrize("name", [name for name in SOUND if not name.startswith("α_min") and "fixed" not in name])
def test_alpha_and_shares_are_those_of_the_whole_step(results: dict[str, Any], name: str) -> None:
    """3 of 24 positive, 9 of 24 negative: α = 1/3; two of four groups degenerate; padding counts nowhere."""
    metrics = results[name]["metrics"]
    assert _value(metrics, "actor/hpo/alpha") == pytest.approx(1 / 3)
    assert _value(metrics, "actor/hpo/share_positive") == pytest.approx(3 / 24)
    assert _value(metrics, "actor/hpo/share_negative") == pytest.approx(9 / 24)
    assert _value(metrics, "actor/hpo/share_degenerate_groups") == pytest.approx(2 / 4)
    batch = harness.make_batch(CASES[name])
    assert _value(metrics, "actor/hpo/response_length") == pytest.approx(float(batch.response_mask.sum()) / 24)


@pytest.mark.parametrize("name", ["noise", "noise, fixed α"])
def test_rounding_noise_of_verls_grpo_is_not_counted(results: dict[str, Any], name: str) -> None:
    """0.9 six times gives −0.056 each in verl's ``grpo``, 0.3 gives +0.029: counting them would make 9 and 15."""
    advantages = results[name]["advantages"]
    assert float(advantages[12, 0]) == pytest.approx(-0.056, abs=1e-3)
    assert float(advantages[18, 0]) == pytest.approx(0.029, abs=1e-3)
    metrics = results[name]["metrics"]
    assert _value(metrics, "actor/hpo/share_positive") == pytest.approx(3 / 24)
    assert _value(metrics, "actor/hpo/share_negative") == pytest.approx(9 / 24)
    assert _value(metrics, "actor/hpo/share_degenerate_groups") == pytest.approx(2 / 4)
    if name == "noise":
        assert _value(metrics, "actor/hpo/alpha") == pytest.approx(1 / 3)


def test_loss_metrics_do_not_depend_on_the_cut(results: dict[str, Any]) -> None:
    """The plain average of verl over unequal micro-batches would differ: these are token means of the whole step."""
    keys = [
        "actor/pg_clipfrac",
        "actor/pg_clipfrac_lower",
        "actor/ppo_kl",
        "actor/hpo/pg_loss_positive",
        "actor/hpo/pg_loss_negative",
        "actor/hpo/loss_share_positive",
        "actor/hpo/loss_share_negative",
    ]
    whole = results["both / whole"]["metrics"]
    assert _value(whole, "actor/pg_clipfrac") > 0.01  # the batch does exercise the clip
    for cut in ("micro-batches of 1", "micro-batches of 4", "dynamic", "permuted", "padding"):
        cut_metrics = results[f"both / {cut}"]["metrics"]
        for key in keys:
            assert _value(cut_metrics, key) == pytest.approx(_value(whole, key), rel=1e-4, abs=1e-7), (cut, key)


def test_alpha_never_falls_below_its_limit(results: dict[str, Any]) -> None:
    """α_min = 0.5 where the ratio is 1/3."""
    assert _value(results["α_min reached"]["metrics"], "actor/hpo/alpha") == pytest.approx(0.5)
