"""Runs cases of ``engine_harness.py`` through verl's FSDP2 engine with Ulysses sequence parallelism on CPU.

Run by ``test_ulysses.py`` as processes, one a rank: ``ulysses_harness.main()`` with the arguments JOB OUT, and RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Flash attention's kernel for packed sequences is replaced by torch's
attention; sharding of the sequences, all-to-all and gradients are verl's own.
"""

from __future__ import annotations

import itertools
import os
import pickle
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import engine_harness as harness
import torch

SIZE = 2
"""Of the sequence parallel group."""

heads: set[int] = set()
"""How many heads the kernel has been given at once."""


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, position_ids: torch.Tensor, **__: Any
) -> torch.Tensor:
    """In the place of flash attention: (1, T, heads, dim), causal within each packed sequence."""
    heads.add(query.shape[2])
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    attended = []
    for begin, end in itertools.pairwise([*starts, query.shape[1]]):
        q, k, v = (x[:, begin:end].transpose(1, 2) for x in (query, key, value))
        attended.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))
    return torch.cat(attended, dim=1)


def build_worker(path: str) -> Any:
    """The worker of ``engine_harness``, with Ulysses and the packed sequences it needs."""
    from transformers import AttentionInterface
    from transformers.integrations.flash_attention import flash_attention_forward
    from verl.models.transformers import monkey_patch

    monkey_patch._flash_attention_forward = causal_attention
    # Under a name with "flash" in it, transformers asks for the flash_attn package.
    AttentionInterface.register("packed_on_cpu", flash_attention_forward)
    model = {"use_remove_padding": True, "override_config": {"attn_implementation": "packed_on_cpu"}}
    return harness.build_worker(path, model, {"ulysses_sequence_parallel_size": SIZE})


def run_case(case: harness.Case, worker: Any, start: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The results of ``engine_harness``, the rows that have reached the loss, and where this rank stands."""
    rows: Counter[tuple[float, ...]] = Counter()
    heads.clear()

    def set_loss_fn(loss_fn: Any) -> None:
        def recorded(**kwargs: Any) -> Any:
            rows.update(tuple(row.tolist()) for row in kwargs["data"]["old_log_probs"].unbind())
            return loss_fn(**kwargs)

        type(worker).set_loss_fn(worker, recorded)

    def train_mini_batch(data: Any) -> Any:
        # verl's output is that of the first rank of a sequence parallel group.
        output = type(worker).train_mini_batch(worker, data)
        return {} if output is None else output

    worker.set_loss_fn, worker.train_mini_batch = set_loss_fn, train_mini_batch
    dp_rank, dp_size = worker.engine.get_data_parallel_rank(), worker.engine.get_data_parallel_size()
    results = harness.run_case(case, worker, start, dp_rank, dp_size)
    return results | {"rows": rows, "heads": set(heads), "dp_rank": dp_rank, "dp_size": dp_size}


def main() -> None:
    """Run every case of a job and write this rank's results."""
    cases, out = pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
    torch.set_num_threads(1)
    os.environ["WG_BACKEND"] = "ray"  # what verl's worker group sets: makes the backend create the gloo group
    import verl  # noqa: F401

    rank = int(os.environ["RANK"])
    path = out.parent / f"model-{rank}"
    harness.build_model(path)
    worker = build_worker(str(path))
    start = {name: value.detach().clone() for name, value in worker.engine.module.named_parameters()}
    results = {case.name: run_case(case, worker, start) for case in cases}
    out.with_suffix(f".{rank}").write_bytes(pickle.dumps(results))
    harness.leave(out)
