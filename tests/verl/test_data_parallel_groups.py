"""verl's Megatron engine gives every rank one slice of the batch, and a group that holds every slice once.

One simulated rank after another, for every layout of up to 16 ranks: torch's fake process group sends nothing. Needs
megatron-core: ``make test-megatron``.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch.distributed as dist


@dataclass(frozen=True)
class Rank:
    """What verl's engine says on one rank."""

    slice: int
    slices: int
    group: tuple[int, ...]
    reports: bool
    """Its outputs are the ones that verl collects."""
    stage: int


def sizes(tensor: int = 1, pipeline: int = 1, context: int = 1, expert: int = 1, virtual: int | None = None) -> Any:
    """The part of verl's ``McoreEngineConfig`` that says how the ranks are divided."""
    return types.SimpleNamespace(
        dynamic_context_parallel=False,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1 if expert > 1 else None,
    )


def layouts(world: int) -> Iterator[tuple[Any, int]]:
    """All that megatron-core admits, and the number of slices in each."""
    few = (1, 2, 4)
    for tensor, pipeline, context, expert, virtual in itertools.product(few, few, few, (1, 2, 4, 8), (None, 2)):
        of_experts = pipeline * (expert if expert > 1 else tensor)
        if world % (tensor * pipeline * context) or world % of_experts or (virtual and pipeline == 1):
            continue
        yield sizes(tensor, pipeline, context, expert, virtual), world // (tensor * pipeline * context)


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Any], list[Rank]]:
    """``MegatronEngine._init_device_mesh`` on every rank of a world."""
    parallel_state = pytest.importorskip("megatron.core.parallel_state", exc_type=ImportError)
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from verl.workers.engine.megatron.transformer_impl import MegatronEngine

    new_group = dist.new_group
    fake = {"backend": "fake", "pg_options": None}
    monkeypatch.setattr(dist, "new_group", lambda *ranks, **options: new_group(*ranks, **options | fake))

    def one(rank: int, world: int, config: Any) -> Rank:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            engine = types.SimpleNamespace(engine_config=config)
            MegatronEngine._init_device_mesh(engine)
            return Rank(
                MegatronEngine.get_data_parallel_rank(engine),
                MegatronEngine.get_data_parallel_size(engine),
                tuple(dist.get_process_group_ranks(MegatronEngine.get_data_parallel_group(engine))),
                MegatronEngine.is_mp_src_rank_with_outputs(engine),
                parallel_state.get_pipeline_model_parallel_rank(),
            )
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    return lambda world, config: [one(rank, world, config) for rank in range(world)]


def violations(ranks: list[Rank], slices: int) -> set[str]:
    """What is wrong with the groups of all ranks."""
    every, found = list(range(slices)), set()
    for number, rank in enumerate(ranks):
        members = [ranks[other] for other in rank.group]
        checks = {
            "the number of slices": rank.slices == slices,
            "a group without its rank": number in rank.group,
            "a group that does not hold every slice once": sorted(member.slice for member in members) == every,
            "groups that overlap": {member.group for member in members} == {rank.group},
            "a group over several stages": len({member.stage for member in members}) == 1,
            "a group of which a part reports": len({member.reports for member in members}) == 1,
        }
        found |= {fault for fault, passed in checks.items() if not passed}
    if sorted(rank.slice for rank in ranks if rank.reports) != every:
        found.add("a slice that is not reported once")
    return found


@pytest.mark.parametrize(("world", "count"), [(2, 8), (4, 32), (8, 80), (16, 136)])
def test_every_data_parallel_group_holds_every_slice_once(simulate: Any, world: int, count: int) -> None:
    assert len(list(layouts(world))) == count
    for config, slices in layouts(world):
        assert violations(simulate(world, config), slices) == set(), config


def test_the_group_of_all_ranks_is_refused(simulate: Any) -> None:
    ranks = simulate(4, sizes(tensor=2))
    assert not violations(ranks, 2)
    wrong = [replace(rank, group=(0, 1, 2, 3)) for rank in ranks]
    assert "a group that does not hold every slice once" in violations(wrong, 2)


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("the number of slices", {"slices": 8}),
        ("a group without its rank", {"group": (1, 3)}),
        ("a group that does not hold every slice once", {"group": (0, 1)}),
        ("groups that overlap", {"group": (0, 3)}),
        ("a group over several stages", {"group": (0, 6)}),
        ("a group of which a part reports", {"reports": True}),
        ("a slice that is not reported once", {"reports": True}),
    ],
)
def test_each_fault_of_one_rank_is_seen(simulate: Any, fault: str, change: dict[str, Any]) -> None:
    first, *others = simulate(8, sizes(tensor=2, pipeline=2))
    assert first.group == (0, 2)
    assert not violations([first, *others], 2)
    assert fault in violations([replace(first, **change), *others], 2)
