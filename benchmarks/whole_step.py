"""A whole step of verl's trainer: A-HPO against GRPO on CPU, at equal tokens.

The quickstart's config, data and start model, with a learning rate of 0. An algorithm changes what the model answers,
and with the length of the answers the time of a step: after some updates two algorithms could not be compared. With
frozen weights both have the same rollouts in every step (the CPU rollout draws each sample from the seed, the step and
the prompt), and everything is computed all the same: advantages, loss, backward pass, optimizer step. That the tokens
and rewards are equal is checked, step by step.

The runs are interleaved (A-HPO, GRPO, GRPO, A-HPO), so that a machine that slows down does so for both; the ratio of
two runs of the same algorithm says what the ratio of two algorithms is worth.

Some ten minutes on two cores. Data and start model are those of ``make quickstart``; missing ones are made.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks._table import Row, markdown, row
from hpo_plugin.check.cluster import SLOW_START
from hpo_plugin.quickstart.form import ENVIRONMENT, Inputs
from hpo_plugin.quickstart.run import PRESET_TITLES, quickstart_inputs, training_of
from hpo_plugin.runs.directory import RunRequest
from hpo_plugin.runs.process import Trainer
from hpo_plugin.runs.training import LOG_ENVIRONMENT, STARTS, failure, why
from hpo_plugin.runs.verl_log import Metrics, Rows, read_rows
from hpo_plugin.tasks.task import load_task

COUNTDOWN = load_task("countdown")
ROOT = Path(__file__).resolve().parents[1]
ORDER = ("ahpo", "grpo", "grpo", "ahpo")
STEPS = 16
#: Steps at the beginning that do not count: the first calls of everything.
WARM_UP = 2
#: Bar: ratio of the medians.
RATIO_BAR = 1.02
#: Seconds without a step after which a run has failed.
STALL = 300.0
#: What must agree between the presets in each step.
EQUAL = ("perf/total_num_tokens", "response_length/mean", "critic/rewards/mean")
#: The parts of a step that an algorithm takes part in, by verl's names of their times.
ALGORITHM_PARTS = ("timing_s/adv", "timing_s/update_actor")


def request(preset: str) -> RunRequest:
    """The quickstart's request for a preset, with frozen weights and without evaluations."""
    frozen = ("actor_rollout_ref.actor.optim.lr=0.0", "trainer.val_before_train=False", "trainer.test_freq=-1")
    return RunRequest(policy_loss=preset, seed=0, steps=STEPS, rollout="hf", n_test=512, overrides=frozen)


def train(preset: str, inputs: Inputs, folder: Path) -> Rows:
    """Run verl's trainer once.

    Args:
        preset: ``algorithm.policy_loss``.
        inputs: Data and start model.
        folder: Takes the log and the metrics.

    Returns:
        The metrics of every step.

    Raises:
        TrainingError: It failed; its log is shown.
    """
    training = training_of(COUNTDOWN, request(preset), inputs)
    overrides = [
        *training.overrides,
        "trainer.logger=[file]",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"hydra.run.dir={folder / 'hydra'}",
    ]
    log, metrics = folder / "trainer.log", folder / "metrics.jsonl"
    command = [sys.executable, "-m", "verl.trainer.main_ppo", f"--config-name={training.config_name}", *overrides]
    environment = {**ENVIRONMENT, **LOG_ENVIRONMENT, "VERL_FILE_LOGGER_PATH": str(metrics)}
    size = 0

    def look() -> bool:
        nonlocal size
        before, size = size, sum(path.stat().st_size for path in (log, metrics) if path.exists())
        return size > before

    for left in reversed(range(STARTS)):
        with Trainer(command, environment, log=log, record=folder / "processes.json") as trainer:
            status = trainer.follow(look, stall=STALL, interval=1.0)
        if status == 0:
            break
        if not left or SLOW_START not in log.read_text(encoding="utf-8", errors="replace"):
            raise failure(log, why(status), "Run the benchmark again.")
    return read_rows(metrics)


def check_equal(runs: Sequence[tuple[str, Rows]]) -> None:
    """Check that every run had the same tokens and rewards in every step.

    Args:
        runs: (preset, metrics by step) of each.

    Raises:
        ValueError: Two runs differ, with the step and the metric; or a step is missing.
    """
    first_preset, first = runs[0]
    for number, (preset, rows) in enumerate(runs, start=1):
        for step in range(1, STEPS + 1):
            for name in EQUAL:
                a, b = first[step][name], rows[step][name]
                if abs(a - b) > 1e-6 * abs(a):
                    raise ValueError(
                        f"step {step}: {name} is {a} in run 1 ({first_preset}) and {b} in run {number} ({preset}): "
                        "their times cannot be compared"
                    )


def times(rows: Rows, names: Sequence[str] = ("timing_s/step",)) -> list[float]:
    """Return the seconds of each step that counts, summed over the named parts."""

    def total(metrics: Metrics) -> float:
        return sum(metrics[name] for name in names)

    return [total(rows[step]) for step in range(WARM_UP + 1, STEPS + 1)]


def compare(runs: Sequence[tuple[str, Rows]]) -> list[Row]:
    """Make the table of finished runs.

    Args:
        runs: (preset, metrics by step) in the order in which they were made.
    """
    check_equal(runs)
    rows = []
    medians: dict[str, float] = {}
    by_run = [(preset, statistics.median(times(steps))) for preset, steps in runs]
    for preset in dict.fromkeys(ORDER):
        seconds = [value for name, steps in runs if name == preset for value in times(steps)]
        medians[preset] = statistics.median(seconds)
        each = ", ".join(f"{median:.3f}" for name, median in by_run if name == preset)
        note = f"median of {len(seconds)} steps; of each run: {each}"
        rows.append(row(f"{PRESET_TITLES[preset]}, step", medians[preset], "s", note=note))
    repeated = {preset: [median for name, median in by_run if name == preset] for preset in medians}
    noise = ", ".join(f"{PRESET_TITLES[preset]} {max(pair) / min(pair):.3f}" for preset, pair in repeated.items())
    note = f"two runs of the same algorithm: {noise}"
    rows.append(row("A-HPO / GRPO, step", medians["ahpo"] / medians["grpo"], "", at_most=RATIO_BAR, note=note))
    parts = {preset: _part(runs, preset) for preset in medians}
    for preset, part in parts.items():
        rows.append(row(f"{PRESET_TITLES[preset]}, advantages and update", part, "s", note=_split(runs, preset)))
    note = "the parts in which the algorithms differ; the others do the same work"
    rows.append(row("A-HPO / GRPO, advantages and update", parts["ahpo"] / parts["grpo"], "", note=note))
    return rows


def _part(runs: Sequence[tuple[str, Rows]], preset: str, names: Sequence[str] = ALGORITHM_PARTS) -> float:
    return statistics.median(value for name, steps in runs if name == preset for value in times(steps, names))


def _split(runs: Sequence[tuple[str, Rows]], preset: str) -> str:
    seconds: Mapping[str, float] = {name: _part(runs, preset, [name]) for name in ALGORITHM_PARTS}
    return ", ".join(f"{name.partition('/')[2]} {value:.3f} s" for name, value in seconds.items())


def run() -> list[Row]:
    """Prepare, train four times, compare."""
    os.environ.update(ENVIRONMENT)
    console = Console(stderr=True)
    output = ROOT / "runs"
    with tempfile.TemporaryDirectory(prefix="whole-step-") as work:
        inputs = quickstart_inputs(COUNTDOWN, request("ahpo"), output, logs=Path(work), console=console)
        runs = []
        for number, preset in enumerate(ORDER, start=1):
            console.print(f"run {number} of {len(ORDER)}: {PRESET_TITLES[preset]}")
            folder = Path(work) / f"{number}-{preset}"
            folder.mkdir()
            runs.append((preset, train(preset, inputs, folder)))
            console.print(f"median of a step: {statistics.median(times(runs[-1][1])):.3f} s")
    return compare(runs)


def main() -> None:
    """Print the table."""
    print(markdown(run()))


if __name__ == "__main__":
    main()
