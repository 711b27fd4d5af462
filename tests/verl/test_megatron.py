"""The gradients of verl's Megatron engine are those of the reference, under every kind of parallelism.

verl's engine, megatron-core's partitioning, schedules and collectives, on CPU and gloo; ``megatron_on_cpu.py`` says
what is replaced. Needs megatron-core and mbridge: ``make test-megatron``.
"""

from __future__ import annotations

import importlib.util
import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from test_equivalence import CASES, _reference, relative_error, run_ranks


def has_megatron() -> bool:
    try:
        return importlib.util.find_spec("megatron.core") is not None and importlib.util.find_spec("mbridge") is not None
    except ModuleNotFoundError:
        return False


pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not has_megatron(), reason="needs megatron-core and mbridge: make test-megatron"),
]

SOUND = ("both / dynamic", "both / multi-turn, permuted, padding", "both / mini-batches and epochs", "loss / dynamic")
FAULTS = ("fault: micro-batch", "fault: twice")


@dataclass(frozen=True)
class Layout:
    """Sizes of verl's Megatron engine, and how many ranks they take."""

    ranks: int
    sizes: dict[str, Any] = field(default_factory=dict)
    experts: bool = False


def parallel(**sizes: int) -> dict[str, int]:
    return {f"{name}_model_parallel_size": size for name, size in sizes.items()}


LAYOUTS = {
    "DP2": Layout(2),
    "TP2": Layout(2, parallel(tensor=2)),
    "PP2": Layout(2, parallel(pipeline=2)),
    "CP2": Layout(2, {"context_parallel_size": 2}),
}
SLOW = {
    "VPP2": Layout(2, parallel(pipeline=2) | {"virtual_pipeline_model_parallel_size": 2}),
    "TP2 x PP2": Layout(4, parallel(tensor=2, pipeline=2)),
    "DP2 x PP2": Layout(4, parallel(pipeline=2)),
    "DP2 x CP2": Layout(4, {"context_parallel_size": 2}),
    # Grouped experts need TransformerEngine.
    "EP2": Layout(2, parallel(expert=2) | {"override_transformer_config": {"moe_grouped_gemm": False}}, experts=True),
}


@pytest.fixture(
    scope="module",
    params=[*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def layout(request: pytest.FixtureRequest) -> Layout:
    return (LAYOUTS | SLOW)[request.param]


@pytest.fixture(scope="module")
def ranks(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of every rank."""
    cases = [CASES[name] for name in (*SOUND, *FAULTS)]
    job = {"layout": layout.sizes, "experts": layout.experts, "cases": cases}
    out = run_ranks("megatron_harness", layout.ranks, tmp_path_factory.mktemp("megatron"), job)
    return [pickle.loads(out.with_suffix(f".{rank}").read_bytes()) for rank in range(layout.ranks)]


def by_expert(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names of a checkpoint, which has each expert's matrices apart; transformers' model has them stacked."""
    apart = {}
    for name, value in gradients.items():
        prefix, _, matrix = name.rpartition(".")
        if matrix not in ("gate_up_proj", "down_proj"):
            apart[name] = value
            continue
        for expert, of_expert in enumerate(value):
            parts = dict(zip(("gate_proj", "up_proj"), of_expert.chunk(2), strict=True))
            for part, gradient in (parts if matrix == "gate_up_proj" else {matrix: of_expert}).items():
                apart[f"{prefix}.{expert}.{part}.weight"] = gradient
    return apart


@pytest.fixture(scope="module")
def expected(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reference's gradients of the same model."""
    import megatron_harness
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("model")
    megatron_harness.build_model(path, experts=layout.experts)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return {name: [by_expert(step) for step in _reference(CASES[name], model)] for name in (*SOUND, *FAULTS)}


@pytest.mark.parametrize("name", SOUND)
def test_gradients_are_those_of_the_reference(ranks: Any, expected: Any, name: str) -> None:
    for rank in ranks:
        error = relative_error(rank[name]["gradients"], expected[name])
        assert error < 5e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_alpha_would_be_seen(ranks: Any, expected: Any, name: str) -> None:
    assert relative_error(ranks[0][name]["gradients"], expected[name]) > 1e-2


@pytest.mark.parametrize("name", SOUND)
def test_each_row_is_in_one_data_parallel_shard_and_only_the_last_stage_has_a_loss(ranks: Any, name: str) -> None:
    case = CASES[name]
    shares = {}
    for rank in ranks:
        result = rank[name]
        assert (result["rows_in_loss"] > 0) == result["is_last_stage"]
        if result["is_last_stage"]:
            shares.setdefault(result["dp_rank"], set()).add(result["rows_in_loss"])
    assert sorted(shares) == list(range(ranks[0][name]["dp_size"]))
    assert all(len(rows) == 1 for rows in shares.values()), shares
    assert sum(min(rows) for rows in shares.values()) == (24 + case.padding_rows) * case.epochs


def test_the_losses_metrics_are_the_same_on_all_ranks_that_report(ranks: Any) -> None:
    reported = [rank["both / dynamic"]["metrics"] for rank in ranks if rank["both / dynamic"]["metrics"] is not None]
    assert reported
    for metrics in reported:
        assert "actor/hpo/pg_loss_negative" in metrics
        for key in ("actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl"):
            assert float(np.mean(metrics[key])) == pytest.approx(float(np.mean(reported[0][key])), rel=1e-5), key
