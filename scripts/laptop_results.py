"""Print the results of quickstarts in docs/quickstart.md, docs/start-model.md and docs/telelogs.md.

    python scripts/laptop_results.py --output runs/results
    python scripts/laptop_results.py --output runs/results --task telelogs

The script reads finished runs. It first makes missing ones, one after another (some nine minutes each on two cores).
"""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from hpo_plugin.quickstart.run import PRESET_TITLES


def finished(output: Path, task: str, preset: str, seed: int) -> dict | None:
    """The result of the first finished run with the default steps; None if there is none."""
    for path in sorted(output.glob(f"{task}_cpu-{preset}-seed{seed}-*/result.json")):
        return json.loads(path.read_text())
    return None


def print_countdown_models(output: Path) -> None:
    """Print the table of docs/start-model.md, and loss and duration below it."""
    below = []
    print("| seed | sampled | greedy | begin with `=` | well-formed |")
    print("|---|---|---|---|---|")
    for path in sorted(output.glob("models/*/start_model.json")):
        made = json.loads(path.read_text())
        got, sampled = made["results"], made["results"]["sampled"]
        shares = (sampled["correct"], got["greedy"]["correct"], sampled["calculated"], sampled["well_formed"])
        cells = [f"{100 * share:.1f} %" for share in shares]
        seed = made["request"]["seed"]
        print(f"| {seed} | {' | '.join(cells)} |")
        losses = f"first and last loss {got['first_loss']:.2f}, {got['last_loss']:.2f}"
        below.append(f"Seed {seed}: {losses}; built in {got['seconds']:.0f} s.")
    print("", *below, sep="\n")


def print_telelogs_models(output: Path) -> None:
    """Print the start models of the SFT stage."""
    print("| start model, seed | steps of SFT | held-out loss, nats per token |")
    print("|---|---|---|")
    for path in sorted(output.glob("models/*/sft.json")):
        made = json.loads(path.read_text())
        print(f"| {made['request']['seed']} | {made['results']['steps']} | {made['results']['held_out_loss']:.3f} |")


def main(
    output: Annotated[Path, typer.Option(help="Where the runs are, or go.")] = Path("runs/results"),
    presets: Annotated[str, typer.Option(help="Values of algorithm.policy_loss, with commas.")] = "ahpo,grpo",
    seeds: Annotated[str, typer.Option(help="With commas.")] = "0,1,2",
    task: Annotated[str, typer.Option(help="countdown or telelogs.")] = "countdown",
) -> None:
    """Print the table as Markdown."""
    pairs = [(preset, int(seed)) for preset in presets.split(",") for seed in seeds.split(",")]
    for preset, seed in pairs:
        if finished(output, task, preset, seed) is None:
            command = [
                "quickstart",
                f"--task={task}",
                f"--policy-loss={preset}",
                f"--seed={seed}",
                f"--output={output}",
            ]
            subprocess.run([sys.executable, "-m", "hpo_plugin.cli", *command], check=True, stdout=sys.stderr)
    results = {pair: finished(output, task, *pair) for pair in pairs}
    ratios = [result["success_after"] / result["success_before"] for result in results.values()]
    steps = {result["steps"] for result in results.values()}
    problems = {result["request"]["n_test"] for result in results.values()}
    assert len(steps) == len(problems) == 1, "the runs differ in steps or in held-out problems"

    print("| algorithm, seed | before | after | standard error | factor |")
    print("|---|---|---|---|---|")
    for ((preset, seed), result), ratio in zip(results.items(), ratios, strict=True):
        before, after, error = (100 * result[f"{key}"] for key in ("success_before", "success_after", "standard_error"))
        print(f"| {PRESET_TITLES[preset]}, {seed} | {before:.1f} % | {after:.1f} % | {error:.1f} % | {ratio:.1f} |")
    for preset in dict.fromkeys(preset for preset, _ in pairs):
        mean = sum(100 * results[pair]["success_after"] for pair in pairs if pair[0] == preset) / len(seeds.split(","))
        print(f"| {PRESET_TITLES[preset]}, mean | | {mean:.1f} % | | |")
    print(f"\n{steps.pop()} steps, {problems.pop()} held-out problems, one sample each at temperature 1.\n")

    (print_countdown_models if task == "countdown" else print_telelogs_models)(output)

    packages = ", ".join(f"{name} {version(name)}" for name in ("hpo-plugin", "verl", "torch", "transformers"))
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}.")


if __name__ == "__main__":
    typer.run(main)
