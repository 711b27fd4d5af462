"""The gradients of verl's FSDP2 engine with Ulysses sequence parallelism are those of the reference.

verl's engine, sharding of sequences and all-to-all, on CPU and gloo; ``ulysses_harness.py`` says what is replaced.
"""

from __future__ import annotations

import pickle
from collections import Counter
from typing import Any

import engine_harness as harness
import pytest
import torch
import ulysses_harness
from test_equivalence import CASES, reference, relative_error, run_ranks
from test_megatron import FAULTS, SOUND

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(
    scope="module", params=[pytest.param(2, id="SP2"), pytest.param(4, id="DP2 x SP2", marks=pytest.mark.slow)]
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of every rank."""
    cases = [CASES[name] for name in (*SOUND, *FAULTS)]
    out = run_ranks("ulysses_harness", request.param, tmp_path_factory.mktemp("ulysses"), cases)
    return [pickle.loads(out.with_suffix(f".{rank}").read_bytes()) for rank in range(request.param)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reference's gradients of the same model."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("model")
    harness.build_model(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return {name: reference(CASES[name], model) for name in (*SOUND, *FAULTS)}


@pytest.mark.parametrize("name", SOUND)
def test_gradients_are_those_of_the_reference(ranks: Any, expected: Any, name: str) -> None:
    for rank in ranks:
        error = relative_error(rank[name]["gradients"], expected[name])
        assert error < 2e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_alpha_would_be_seen(ranks: Any, expected: Any, name: str) -> None:
    assert relative_error(ranks[0][name]["gradients"], expected[name]) > 1e-2


@pytest.mark.parametrize("name", SOUND)
def test_each_row_is_in_one_data_parallel_shard(ranks: Any, name: str) -> None:
    """All ranks of a sequence parallel group have the row."""
    case, size = CASES[name], ulysses_harness.SIZE
    groups: dict[int, list[Counter[tuple[float, ...]]]] = {}
    for rank in ranks:
        groups.setdefault(rank[name]["dp_rank"], []).append(rank[name]["rows"])
    assert sorted(groups) == list(range(len(ranks) // size))
    assert all(group == [group[0]] * size for group in groups.values())
    shards = [group[0] for group in groups.values()]
    batch = harness.make_batch(case)
    for row, length in zip(batch.old_log_probs, batch.lengths, strict=True):
        counts = [shard[tuple(row[:length].tolist())] for shard in shards]
        assert [count for count in counts if count] == [case.epochs]
    assert sum(shard.total() for shard in shards) == (24 + case.padding_rows) * case.epochs


def test_the_heads_really_were_divided(ranks: Any) -> None:
    """Otherwise invariance would be proved of nothing."""
    for rank in ranks:
        assert rank["both / dynamic"]["heads"] == {2 // ulysses_harness.SIZE}
