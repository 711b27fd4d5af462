"""Computes the tables of docs/hardware.md from the recipes' configs.

    python scripts/hardware_page.py           # print the page
    python scripts/hardware_page.py --write   # write the page

Two comments enclose each table, and the first one names it: ``<!-- table: models -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from hpo_plugin.check.compose import compose
from hpo_plugin.errors import ConfigError
from hpo_plugin.recipe.layout import check_sharding
from hpo_plugin.recipe.memory import BF16, GIB, Sizes

PAGE = Path(__file__).parents[1] / "docs" / "hardware.md"
GROUPS = Path(__file__).parents[1] / "hpo_plugin" / "configs" / "hpo"
ENGINES = ("fsdp2", "megatron")
TITLES = {"fsdp2": "FSDP2", "megatron": "Megatron"}
#: countdown4 has the batch and the lengths of countdown3.
TASKS = {"countdown3": "Countdown", "telelogs": "TeleLogs"}

#: Task, model, engine.
Recipe = tuple[str, str, str]


def choices(group: str) -> list[str]:
    """The names in a group of configs; clusters and models by the size in their names."""
    names = [path.stem for path in (GROUPS / group).glob("*.yaml")]
    size = {"cluster": r"^(\d+)x", "model": r"([\d.]+)b$"}.get(group)
    return sorted(names, key=lambda name: (float(re.search(size, name)[1]) if size else 0, name))


def recipes() -> dict[Recipe, DictConfig]:
    """Every task with every model and engine, on one node."""
    composed = {}
    for recipe in itertools.product(choices("task"), choices("model"), ENGINES):
        names = zip(("task", "model", "engine"), recipe, strict=True)
        config, finding = compose("hpo_recipe", [f"hpo/{group}={name}" for group, name in names])
        if config is None:
            raise RuntimeError(f"{recipe}: {finding.found}")
        composed[recipe] = config
    return composed


def on(sizes: Sizes, nodes: int, gpus_per_node: int) -> Sizes | None:
    """The same recipe on another cluster, or None if its batch and model cannot be sharded over it."""
    layout = dataclasses.replace(sizes.layout, nodes=nodes, gpus_per_node=gpus_per_node)
    try:
        check_sharding(layout, sizes.architecture)
    except ConfigError:
        return None
    return dataclasses.replace(sizes, layout=layout)


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """In Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gib(size: float) -> str:
    """One decimal."""
    return f"{size / GIB:.1f}"


def models(composed: Mapping[Recipe, DictConfig]) -> str:
    """What a model is, whatever runs it."""
    rows = []
    for model in choices("model"):
        known = Sizes.of(composed["telelogs", model, "fsdp2"]).architecture
        rows.append([f"`{model}`", f"{known.parameters:,}", gib(BF16 * known.parameters), f"{known.kv_bytes:,}"])
    return table(("model", "parameters P", "bf16 weights [GiB]", "keys and values of a token [B]"), rows)


def transfers(composed: Mapping[Recipe, DictConfig]) -> str:
    """What goes to a disk and over a network."""
    rows = []
    for model in choices("model"):
        sizes = [Sizes.of(composed["telelogs", model, engine]) for engine in ENGINES]
        rows.append(
            [f"`{model}`", *(gib(each.checkpoint) for each in sizes), *(gib(each.weight_sync) for each in sizes)]
        )
    titles = [f"{what}, {engine}" for what in ("checkpoint", "weight sync") for engine in TITLES.values()]
    return table(("model", *titles), rows)


def tokens(composed: Mapping[Recipe, DictConfig]) -> str:
    """What a step is, whatever model runs it."""
    columns = []
    for task in choices("task"):
        sizes = Sizes.of(composed[task, "qwen2.5-1.5b", "fsdp2"])
        layout = sizes.layout
        columns.append(
            (
                f"{layout.prompts} x {layout.responses} = {sizes.rows:,}",
                f"{layout.prompts // layout.mini_batch_prompts} x {layout.mini_batch_rows}",
                f"{layout.prompt_tokens:,} + {layout.response_tokens:,}",
                f"{sizes.expected_tokens:,}",
                f"{sizes.most_tokens:,}",
            )
        )
    names = (
        "prompts x n = rows per step",
        "mini-batches x rows",
        "longest prompt + response",
        "expected tokens per step",
        "maximum tokens per step",
    )
    return table(("quantity", *(f"`{task}`" for task in choices("task"))), zip(names, *columns, strict=True))


def memory(engine: str, composed: Mapping[Recipe, DictConfig]) -> str:
    """A GPU's memory on one node of eight; the same for all tasks but for the rows that vLLM holds."""
    columns = []
    for model in choices("model"):
        sizes = Sizes.of(composed["telelogs", model, engine])
        countdown = Sizes.of(composed["countdown3", model, engine])
        parts = (sizes.weights, sizes.gradients, sizes.optimizer, sizes.gathered, sizes.activations)
        logits = (sizes.update_logits, sizes.log_prob_logits)
        peaks = (sizes.update_peak, sizes.rollout_peak)
        held = (f"{countdown.kv_rows:,}", f"{sizes.kv_rows:,}")
        columns.append([*map(gib, (*parts, *logits)), *(f"**{gib(peak)}**" for peak in peaks), *held])
    names = (
        "parameters",
        "gradients",
        "optimizer",
        "gathered",
        "activations",
        "logits, update",
        "logits, log-probs",
        "**peak of the update**",
        "**peak of generation**",
        "full rows per replica, Countdown",
        "full rows per replica, TeleLogs",
    )
    header = (f"{TITLES[engine]}, per GPU", *(f"`{model}`" for model in choices("model")))
    return table(header, zip(names, *columns, strict=True))


def gpus(composed: Mapping[Recipe, DictConfig]) -> str:
    """The fewest GPUs of 80 GB."""
    rows = []
    for model, engine in itertools.product(choices("model"), ENGINES):
        needed = []
        for task in TASKS:
            sizes = Sizes.of(composed[task, model, engine])
            fits = (n for n in (1, 2, 4, 8) if (moved := on(sizes, 1, n)) and moved.fits)
            needed.append(next(fits, "more than 8"))
        rows.append([f"`{model}`", f"`{engine}`", *needed])
    return table(("model", "engine", *TASKS.values()), rows)


def ranks(task: str, composed: Mapping[Recipe, DictConfig]) -> str:
    """Rows of a mini-batch on a rank, for the clusters that a batch can be divided over."""
    rows = []
    for model, engine in itertools.product(choices("model"), ENGINES):
        sizes = Sizes.of(composed[task, model, engine])
        moves = [on(sizes, *map(int, cluster.split("x"))) for cluster in choices("cluster")]
        rows.append([f"`{model}`, `{engine}`", *(moved.layout.rows_of_rank if moved else "error" for moved in moves)])
    return table((TASKS[task], *(f"`{name}`" for name in choices("cluster"))), rows)


TABLES: dict[str, Callable[[Mapping[Recipe, DictConfig]], str]] = {
    "models": models,
    "transfers": transfers,
    "tokens": tokens,
    "memory_fsdp2": partial(memory, "fsdp2"),
    "memory_megatron": partial(memory, "megatron"),
    "gpus": gpus,
    "ranks_countdown": partial(ranks, "countdown3"),
    "ranks_telelogs": partial(ranks, "telelogs"),
}


def page(text: str, composed: Mapping[Recipe, DictConfig]) -> str:
    """A page with its tables computed anew; an unknown name is an error."""
    tables = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
    return tables.sub(lambda found: f"<!-- table: {found[1]} -->\n\n{TABLES[found[1]](composed)}\n\n<!-- end -->", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace docs/hardware.md")
    computed = page(PAGE.read_text(), recipes())
    if parser.parse_args().write:
        PAGE.write_text(computed)
    else:
        print(computed, end="")
