"""Long runs: memory, file handles and logs of every process of a training, and a study with many cells.

python -m torture.long_run --hours 0.1 FOLDER    # train and sample; FOLDER gets the samples
python -m torture.long_run --read FOLDER         # judge the samples and logs of a folder
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from scipy import stats

from hpo_plugin.runs.verl_log import MetricsFile
from torture.faults import Command
from torture.probe import Probe, Result
from torture.scale import run_command

MIB = 2**20
#: Seconds between two samples.
INTERVAL = 15.0
#: The same for a study, whose simulated cells take a few seconds each.
STUDY_INTERVAL = 1.0
#: Share of the steps at the beginning that does not count.
WARM_UP = 0.25
#: Blocks of a series; a slope is fitted to their medians, because neighboring samples are not independent.
BLOCKS = 8
CONFIDENCE = 0.95
#: Largest upper end of the interval of the slope of a process's private memory, in MiB per 100 steps.
MEMORY_BOUND = 5.0
#: Largest growth of the numbers of file handles and of threads of a process, per 100 steps.
HANDLES_BOUND, THREADS_BOUND = 1.0, 1.0
#: Larger bounds of memory. An actor of Ray that returns actor handles grows (:func:`actor_handles`), and verl's load
#: balancer returns one for each response. Ray's GCS server stores the events of 100,000 tasks, and then the ids of up
#: to 1,000,000 older ones (``GcsTaskManager``, limits ``task_events_max_*`` of Ray).
MEMORY_BOUNDS = {"ray::GlobalRequestLoadBalancer": 20.0, "gcs_server": 10.0}
#: Largest size of all logs of a run for each step, in bytes.
LOG_BOUND = 32_768.0


# --- samples -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One process at one time.

    Attributes:
        seconds: Time since the start.
        step: Last step that is logged.
        role: What the process does, see :func:`role_of`.
        process: Identity of the process: its number and its time of creation.
        private: Memory that no other process shares (USS), in MiB.
        resident: Resident memory, in MiB.
        handles: Open file descriptors.
        threads: Threads.
    """

    seconds: float
    step: int
    role: str
    process: str
    private: float
    resident: float
    handles: int
    threads: int


def role_of(command: Sequence[str]) -> str:
    """What a process does, from its command line.

    Ray renames its workers: ``ray::WorkerDict.actor_rollout_update_actor`` has the role ``ray::WorkerDict``.
    """
    text = " ".join(command)
    if worker := re.match(r"ray::\w+", text):
        return worker[0]
    for module, role in (("verl.trainer.main_ppo", "trainer"), ("hpo_plugin.cli", "hpo-plugin")):
        if f"-m {module}" in text:
            return role
    if "multiprocessing" in text:
        return "simulator" if "spawn_main" in text else "multiprocessing"
    program = Path(command[0]).name if command else "unknown"
    if program.startswith("python") and len(command) > 1:
        scripts = [word for word in command[1:] if not word.startswith("-")]
        return Path(scripts[0]).name if scripts else program
    return program


def sample(processes: Iterable[psutil.Process], seconds: float, step: int) -> list[Sample]:
    """Sample processes; one that has ended is left out."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            memory = process.memory_full_info()
            found.append(
                Sample(
                    seconds=round(seconds, 1),
                    step=step,
                    role=role_of(process.cmdline()),
                    process=f"{process.pid}-{process.create_time():.0f}",
                    private=memory.uss / MIB,
                    resident=memory.rss / MIB,
                    handles=process.num_fds(),
                    threads=process.num_threads(),
                )
            )
    return found


# --- slopes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slope:
    """A slope and its 95 % interval."""

    value: float
    low: float
    high: float


def slope(x: Sequence[float], y: Sequence[float]) -> Slope:
    """The slope of a series after the warm-up.

    Args:
        x: steps, ascending.
        y: values.

    Returns:
        The slope of a line through the medians of :data:`BLOCKS` blocks, with the interval of Student's t. The interval
        is infinite if there are too few values, or if ``x`` does not change.
    """
    all_x = np.asarray(x, float)
    # Not a share of the samples: in a study, the first cells can take most of the time.
    begin = int(np.searchsorted(all_x, all_x[0] + WARM_UP * (all_x[-1] - all_x[0])))
    kept_x, kept_y = all_x[begin:], np.asarray(y[begin:], float)
    if len(kept_x) < 2 * BLOCKS or np.ptp(kept_x) == 0:
        return Slope(math.nan, -math.inf, math.inf)
    middle_x, middle_y = (
        np.array([np.median(block) for block in np.array_split(values, BLOCKS)]) for values in (kept_x, kept_y)
    )
    # Not scipy.stats.linregress, whose standard error of a constant series is NaN.
    centered = middle_x - middle_x.mean()
    value = float(centered @ middle_y / (centered @ centered))
    rest = middle_y - middle_y.mean() - value * centered
    error = math.sqrt(rest @ rest / (BLOCKS - 2) / (centered @ centered))
    width = float(stats.t.ppf((1 + CONFIDENCE) / 2, BLOCKS - 2)) * error
    return Slope(value, value - width, value + width)


def growth(x: Sequence[float], y: Sequence[float]) -> float:
    """How fast a number of open handles or threads grows: its lowest value in the last quarter against the second.

    A handle that leaks stays open, so it is in all later numbers. One that is opened and closed again is not in the
    lowest: Ray's processes close idle connections to each other, and open them when they need them.

    Args:
        x: steps, ascending.
        y: numbers.

    Returns:
        The growth per unit of ``x``; infinite if there are too few values, or if ``x`` does not change.
    """
    all_x, numbers = np.asarray(x, float), np.asarray(y, float)
    share = (all_x - all_x[0]) / max(float(np.ptp(all_x)), 1e-9)
    early, late = (share >= WARM_UP) & (share < 2 * WARM_UP), share >= 1 - WARM_UP
    if min(early.sum(), late.sum()) < BLOCKS // 2 or (share >= WARM_UP).sum() < 2 * BLOCKS or np.ptp(all_x) == 0:
        return math.inf
    return float((numbers[late].min() - numbers[early].min()) / (all_x[late].mean() - all_x[early].mean()))


@dataclass(frozen=True)
class Trend:
    """How one process changes.

    Attributes:
        role: See :class:`Sample`.
        private: Private memory in MiB per 100 steps.
        handles: Growth of the number of file handles per 100 steps.
        threads: The same of threads.
        peak: Largest resident memory, in MiB.
        samples: Number of samples.
    """

    role: str
    private: Slope
    handles: float
    threads: float
    peak: float
    samples: int


def trends(samples: Sequence[Sample], *, share: float = 0.5) -> list[Trend]:
    """The trends of all processes that lived for at least a share of the run, by role."""
    by_process: dict[str, list[Sample]] = {}
    for entry in samples:
        by_process.setdefault(entry.process, []).append(entry)
    times = len({entry.seconds for entry in samples})
    found = []
    for entries in by_process.values():
        if len(entries) < share * times:
            continue
        steps = [entry.step / 100 for entry in entries]
        found.append(
            Trend(
                # Ray names a worker when it gets its first task.
                role=entries[-1].role,
                private=slope(steps, [entry.private for entry in entries]),
                handles=growth(steps, [entry.handles for entry in entries]),
                threads=growth(steps, [entry.threads for entry in entries]),
                peak=max(entry.resident for entry in entries),
                samples=len(entries),
            )
        )
    return sorted(found, key=lambda trend: trend.role)


def judge(found: Sequence[Trend], result: Result, *, steps: str = "steps") -> None:
    """Add the trends to a result; a growth, or the upper end of the interval of a slope, above its bound is a failure.

    Args:
        found: the trends.
        result: gets the failures and the largest slopes.
        steps: what was counted as steps.
    """
    for trend in found:
        private, bound = trend.private, MEMORY_BOUNDS.get(trend.role, MEMORY_BOUND)
        memory = "private memory" + (f" of {trend.role}" if trend.role in MEMORY_BOUNDS else "")
        if not private.high <= bound:
            result.failures.append(
                f"{trend.role}: {memory} grows by {private.value:.3g} [{private.low:.3g}, {private.high:.3g}] MiB per "
                f"100 {steps}, bound {bound:g} ({trend.samples} samples)"
            )
        if math.isfinite(private.high):
            result.measure(f"largest slope of {memory} (MiB per 100 {steps})", private.value)
            result.measure(f"upper end of the 95 % intervals of {memory}", private.high)
        for what, value, most in (
            ("file handles", trend.handles, HANDLES_BOUND),
            ("threads", trend.threads, THREADS_BOUND),
        ):
            if not value <= most:
                result.failures.append(
                    f"{trend.role}: {what} grow by {value:.3g} per 100 {steps}, bound {most:g} "
                    f"({trend.samples} samples)"
                )
            if math.isfinite(value):
                result.measure(f"largest growth of {what} (per 100 {steps})", value)
        result.measure("largest process (MiB)", trend.peak)


def written(trend: Trend) -> str:
    """A trend in one line."""
    memory = f"{trend.private.value:.3g} [{trend.private.low:.3g}, {trend.private.high:.3g}] MiB"
    return (
        f"{trend.role}: {memory}, {trend.handles:.3g} handles and {trend.threads:.3g} threads per 100 steps; peak "
        f"{trend.peak:.0f} MiB; {trend.samples} samples"
    )


# --- a long training -----------------------------------------------------------------------------------------------


def quickstart(folder: Path) -> list[str]:
    """The command of a run that does not end by itself."""
    arguments = [sys.executable, "-m", "hpo_plugin.cli", "quickstart", "--steps=1000000", "--n-test=64"]
    return [*arguments, f"--output={folder / 'runs'}", "trainer.max_actor_ckpt_to_keep=2", "trainer.test_freq=20"]


def train(folder: Path, *, hours: float, interval: float = INTERVAL) -> Result:
    """Run ``hpo-plugin quickstart`` for some time, sample all of its processes, interrupt it, and judge the trends.

    Args:
        folder: gets the run, and ``samples.jsonl``.
        hours: how long to train, from the first step.
        interval: seconds between samples.
    """
    # A shell makes its background jobs ignore SIGINT, and their children inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command, progress, result = Command(quickstart(folder), folder), Progress(folder), Result()
    begin, first = time.monotonic(), math.nan
    try:
        with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
            while not time.monotonic() - first > hours * 3600:
                if not command.running():
                    result.failures.append(f"the command ended: {command.output()[-2000:]}")
                    break
                step = progress.step()
                if step and math.isnan(first):
                    first = time.monotonic()
                if step:
                    new = sample(command.members(), time.monotonic() - first, step)
                    file.writelines(json.dumps(asdict(entry)) + "\n" for entry in new)
                    file.flush()
                elif time.monotonic() - begin > 1800:
                    result.failures.append(f"no step within 30 minutes: {command.output()[-2000:]}")
                    break
                time.sleep(interval)
        command.process.send_signal(signal.SIGINT)
        if command.wait(120.0) != 130:
            result.failures.append("the command did not end with exit status 130 within 120 s after an interrupt")
        if left := command.left():
            result.failures.append(f"{len(left)} processes are left after the interrupt")
    finally:
        command.kill()
    judge_training(folder, result)
    return result


def judge_training(folder: Path, result: Result) -> None:
    """Judge the samples and logs that :func:`train` has written, and print the trend of each process.

    Args:
        folder: contains ``samples.jsonl`` and the run.
        result: gets the failures and the measurements.
    """
    with (folder / "samples.jsonl").open(encoding="utf-8") as file:
        samples = [Sample(**json.loads(line)) for line in file]
    steps, logs, found = Progress(folder).step(), log_bytes(folder), trends(samples)
    for trend in found:
        print(written(trend), flush=True)
    judge(found, result)
    if not found:
        result.failures.append("no process was sampled")
    result.inputs = steps
    result.measure("hours", samples[-1].seconds / 3600 if samples else 0.0)
    result.measure("sampled processes", len(found))
    result.measure("logs (kB per step)", logs / max(steps, 1) / 1000)
    if logs > LOG_BOUND * steps:
        result.failures.append(f"the logs have {logs / max(steps, 1):.0f} bytes per step, bound {LOG_BOUND:g}")


class Progress:
    """The last step that the run in a folder has logged."""

    def __init__(self, folder: Path) -> None:
        """Read nothing yet.

        Args:
            folder: contains ``runs``.
        """
        self._folder = folder
        self._files: dict[Path, MetricsFile] = {}
        self._step = 0

    def step(self) -> int:
        """The step; 0 before the first."""
        for attempt in _attempts(self._folder):
            file = self._files.setdefault(attempt, MetricsFile(attempt / "metrics.jsonl"))
            self._step = max([self._step, *(step for step, _ in file.new_rows())])
        return self._step


def _attempts(folder: Path) -> list[Path]:
    return sorted((folder / "runs").glob("*/attempt-*"))


def log_bytes(folder: Path) -> int:
    """The size of all logs and metrics of the run in a folder."""
    files = [folder / "output.log", *(path for attempt in _attempts(folder) for path in attempt.glob("*.*"))]
    return sum(path.stat().st_size for path in files if path.is_file())


# --- a study -------------------------------------------------------------------------------------------------------


def declaration(simulated: int, real: int) -> dict[str, Any]:
    """A study with two arms, and so many cells of the simulator and of verl's trainer, each of a few steps."""
    prepare = {
        "task": "countdown",
        "problems": {"counts": [3], "max_number": 12},
        "start_model": {"steps": 60},
        "train_size": 128,
        "test_size": 32,
    }
    arms = ["grpo", "ahpo"]
    return {
        "name": "many-cells",
        "title": "Many cells",
        "config_name": "countdown_cpu",
        "steps": 3,
        "test_every": 3,
        "environment": {"VERL_PLATFORM": "cpu"},
        "overrides": ["data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=8"],
        "settings": {
            "simulated": {"title": "Simulator", "trainer": "simulator", "prepare": prepare},
            "real": {"title": "verl's trainer", "prepare": prepare, "overrides": ["trainer.max_actor_ckpt_to_keep=2"]},
        },
        "arms": {name: {"title": name, "overrides": [f"algorithm.policy_loss={name}"]} for name in arms},
        "experiments": {
            name: {"title": name, "setting": name, "arms": arms, "seeds": list(range(number // 2)), "compare": "ahpo"}
            for name, number in (("simulated", simulated), ("real", real))
            if number
        },
    }


def study(folder: Path, *, simulated: int = 200, real: int = 10, interval: float = STUDY_INTERVAL) -> Result:
    """Run a study of many cells with two jobs, sample its processes, then show, collect and report it."""
    cells, result = simulated + real, Result(inputs=simulated + real)
    path = folder / "study.yaml"
    declared = declaration(simulated, real)
    declared["settings"] = {name: declared["settings"][name] for name in declared["experiments"]}
    path.write_text(yaml.safe_dump(declared, sort_keys=False), encoding="utf-8")
    output = f"--output={folder / 'runs'}"
    run = [sys.executable, "-m", "hpo_plugin.cli", "study", "run", str(path), output, "--jobs=2"]
    command, samples = Command(run, folder), list[Sample]()
    begin = time.monotonic()
    total: dict[str, float] = {"private memory of all processes (MiB)": 0, "processes": 0, "file handles": 0}
    try:
        while command.running():
            done = len(list((folder / "runs" / "many-cells" / "cells").glob("*/result.json")))
            new = sample(command.members(), time.monotonic() - begin, done)
            samples += new
            for name, value in (
                ("private memory of all processes (MiB)", sum(entry.private for entry in new)),
                ("processes", len(new)),
                ("file handles", sum(entry.handles for entry in new)),
            ):
                total[name] = max(total[name], value)
            time.sleep(interval)
        if command.process.returncode:
            result.failures.append(f"exit status {command.process.returncode}: {command.output()[-2000:]}")
        if left := command.left():
            result.failures.append(f"{len(left)} processes are left")
    finally:
        command.kill()
    result.measure("minutes", (time.monotonic() - begin) / 60)
    for name, value in total.items():
        result.measure(f"largest number of {name}" if "MiB" not in name else f"largest {name}", value)
    lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in samples)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
    # The process that follows the cells, and those of the simulator, which train one cell after another.
    found = [trend for trend in trends(samples) if trend.role in ("hpo-plugin", "simulator")]
    for trend in found:
        print(written(trend), flush=True)
    judge(found, result, steps="cells")
    if result.failures:
        return result
    for name, arguments, expected in (
        ("status", [str(path), output], f"{cells} finished"),
        ("collect", [str(path), output], f"added: {cells} "),
        ("report", [str(path), f"--output={folder / 'report'}", "--no-png"], "many-cells.md"),
    ):
        done_command = run_command("study", name, *arguments)
        if expected not in done_command.text:
            result.failures.append(f"{name}: {expected!r} is not in the output:\n{done_command.text[-1000:]}")
    files = [file for file in (folder / "runs").rglob("*") if file.is_file()]
    result.measure("files", len(files))
    result.measure("run directories (MB)", sum(file.stat().st_size for file in files) / 1e6)
    return result


# --- actor handles -------------------------------------------------------------------------------------------------


class Answering:
    """An actor whose methods return an actor handle, as verl's load balancer does, or a text."""

    def __init__(self, server: Any) -> None:
        """Keep the handle."""
        self._server = server

    def handle(self) -> Any:
        """Return the handle."""
        return self._server

    def text(self) -> str:
        """Return a text."""
        return "server"

    def memory(self) -> int:
        """Return the private memory of this process, in bytes."""
        return int(psutil.Process().memory_full_info().uss)


def actor_handles(folder: Path, *, calls: int = 96_000, batch: int = 100) -> Result:
    """Measure the memory of a Ray actor that returns actor handles, and of one that returns texts.

    Growth with texts is a failure. No growth with handles is one as well: :data:`MEMORY_BOUNDS` is then out of date.
    """
    import ray

    result, points = Result(inputs=2 * calls), 4 * BLOCKS
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        actor_class = ray.remote(num_cpus=0)(Answering)
        server = actor_class.remote(None)
        for kind in ("handle", "text"):
            actor, done, memory = actor_class.remote(server), list[float](), list[float]()
            for point in range(points):
                for _ in range(calls // points // batch):
                    ray.get([getattr(actor, kind).remote() for _ in range(batch)])
                done.append((point + 1) * (calls // points // batch) * batch)
                memory.append(ray.get(actor.memory.remote()))
            found = slope(done, memory)
            result.measure(f"bytes for each {kind}", round(found.value, 1))
            grows = found.low > 0 and found.value > 200
            if grows is not (kind == "handle"):
                result.failures.append(f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}] bytes for each {kind}")
    finally:
        ray.shutdown()
    return result


# --- the command ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Train for some hours, or read samples."""
    parser = argparse.ArgumentParser(prog="python -m torture.long_run", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--interval", type=float, default=INTERVAL)
    parser.add_argument("--read", action="store_true", help="only judge the samples and logs in the folder")
    given = parser.parse_args(arguments)
    if given.read:
        result = Result()
        judge_training(given.folder, result)
    else:
        given.folder.mkdir(parents=True, exist_ok=True)
        result = train(given.folder.resolve(), hours=given.hours, interval=given.interval)
    print(json.dumps(asdict(result), indent=1, ensure_ascii=False))
    return 1 if result.failures else 0


PROBES = (
    Probe(
        "long-run",
        "long-runs",
        "two hours of `hpo-plugin quickstart` on CPU cores; each of its processes is sampled every 15 seconds",
        "per process, with 95 % confidence: at most 5 MiB (verl's load balancer 20 MiB, Ray's GCS server 10 MiB), "
        "one file handle and one thread per 100 steps; at most 32 kB of logs per step; no process is left",
        {"one": partial(train, hours=2.0)},
        limit=4 * 3600.0,
    ),
    Probe(
        "actor-handles",
        "long-runs",
        "a Ray actor that returns actor handles, and one that returns texts",
        "the first grows, which is why verl's load balancer has another bound; the second does not",
        {"one": actor_handles},
    ),
    Probe(
        "study-210-cells",
        "long-runs",
        "`hpo-plugin study run --jobs 2` with 200 cells of the simulator and 10 of verl's trainer, then `status`, "
        "`collect` and `report`",
        "all cells are finished, collected and reported; the bounds of the first row for 100 cells; no process is left",
        {"one": study},
        limit=4 * 3600.0,
    ),
)


if __name__ == "__main__":
    sys.exit(main())
