"""Prints what a new verl changed in the places that this package touches.

    python scripts/what_moved.py NEW [--old OLD]

NEW and OLD are source trees of verl: a git checkout, or a directory that holds an installed ``verl``. OLD is the
installed verl if not given. Exits with 1 if something is gone. Then run ``make test-verl VERL=<version>``
(``docs/versions.md``).
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import sys
from pathlib import Path

#: Functions and classes by file; ``file:name`` with a dot for a method.
TOUCHED = {
    "the estimator is registered and called here": (
        "verl/trainer/ppo/core_algos.py:register_adv_est",
        "verl/trainer/ppo/ray_trainer.py:compute_advantage",
        "verl/trainer/ppo/v1/utils.py:compute_advantage_for_multi_trajectories",
        "verl/trainer/ppo/v1/trainer_base.py:PPOTrainer._compute_advantage",
    ),
    "the policy loss is registered and called here": (
        "verl/trainer/ppo/core_algos.py:register_policy_loss",
        "verl/trainer/ppo/core_algos.py:agg_loss",
        "verl/trainer/ppo/core_algos.py:compute_policy_loss_vanilla",
        "verl/workers/utils/losses.py:ppo_loss",
        "verl/workers/config/actor.py:PolicyLossConfig",
    ),
    "the config is checked here": (
        "verl/utils/config.py:validate_config",
        "verl/trainer/main_ppo.py:run_ppo",
        "verl/trainer/config/algorithm.py:AlgoConfig",
    ),
    "metrics enter the log here": (
        "verl/trainer/ppo/metric_utils.py:compute_data_metrics",
        "verl/utils/metric/utils.py:AggregationType",
    ),
    "the CPU backend builds on this": (
        "verl/plugin/platform/platform_base.py:PlatformBase",
        "verl/workers/engine/fsdp/transformer_impl.py:FSDPEngine._build_fsdp_module",
        "verl/workers/rollout/base.py:BaseRollout",
        "verl/workers/rollout/replica.py:RolloutReplica",
        "verl/utils/distributed.py:initialize_global_process_group",
    ),
}


def source_of(tree: Path, place: str) -> str | None:
    """The text of a function, class or method; None if it does not exist."""
    file, _, name = place.partition(":")
    path = tree / file
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    nodes: list[ast.AST] = [ast.parse(text)]
    for part in name.split("."):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        nodes = [
            child
            for node in nodes
            for child in ast.walk(node)
            if isinstance(child, kinds) and child is not node and child.name == part
        ][:1]
    return ast.get_source_segment(text, nodes[0]) if nodes else None


def elsewhere(tree: Path, place: str) -> list[str]:
    """Files of a tree that define a name of this kind."""
    last = place.rpartition(":")[2].rpartition(".")[2]
    beginnings = (f"def {last}(", f"async def {last}(", f"class {last}(", f"class {last}:")
    return sorted(
        path.relative_to(tree).as_posix()
        for path in (tree / "verl").rglob("*.py")
        if any(line.lstrip().startswith(beginnings) for line in path.read_text(encoding="utf-8").splitlines())
    )


def installed() -> Path:
    """The directory that holds the installed verl."""
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        sys.exit("verl is not installed: name the old tree with --old")
    return Path(spec.origin).parents[1]


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path)
    parser.add_argument("--old", type=Path)
    arguments = parser.parse_args()
    old, new = arguments.old or installed(), arguments.new
    for tree in (old, new):
        if not (tree / "verl/__init__.py").is_file():
            parser.error(f"{tree} holds no verl/__init__.py")
    gone = False
    for why, places in TOUCHED.items():
        print(f"\n{why}")
        for place in places:
            before, after = source_of(old, place), source_of(new, place)
            if before == after:
                print(f"  {'same' if after is not None else 'in neither'}: {place}")
            elif after is None:
                gone = True
                print(f"  GONE: {place}; that name is now in {', '.join(elsewhere(new, place)) or 'no file'}")
            elif before is None:
                print(f"  new: {place}")
            else:
                print(f"  changed: {place}")
                lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1)
                print("\n".join(f"      {line}" for line in list(lines)[2:]))
    sys.exit(gone)


if __name__ == "__main__":
    main()
