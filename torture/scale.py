"""Large inputs: batches of 16,384 responses, clusters of 512 nodes, and studies of 10,000 cells."""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import psutil
import yaml

from torture.probe import Probe, Result

if TYPE_CHECKING:
    import torch

MIB = 2**20
GROUP, ALPHA_MIN = 16, 0.1
#: Memory beyond the result that the estimator may need: a share of the result, and bytes for small batches.
EXTRA_SHARE, EXTRA_BYTES = 0.05, 48 * MIB
#: Largest number of lines of a report, and of characters in a line, however many nodes or cells there are.
LINES, CHARACTERS = 60, 1500
#: Largest memory of a command on a study of 10,000 cells with 60 steps each, in MiB.
STUDY_MIB = 2048


# --- memory --------------------------------------------------------------------------------------------------------


def _memory(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:"))


def peak_bytes(function: Callable[[], Any]) -> tuple[int, Any]:
    """How far a call raises the peak of this process's resident memory, and the result of the call.

    Linux sets the peak (``VmHWM``) to the present value if a process writes 5 to its ``clear_refs``.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _memory("VmRSS")
    result = function()
    return _memory("VmHWM") - before, result


# --- the estimator and the metrics ---------------------------------------------------------------------------------


def batch(responses: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """A rollout batch with verl's dtypes: fp32 rewards, an int64 mask, and uids. It is filled in place."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, tokens + 1, (responses,), generator=generator)
    scores = (torch.rand(responses, generator=generator) < 0.2).float()
    rewards = torch.empty(responses, tokens)
    mask = torch.empty(responses, tokens, dtype=torch.int64)
    positions = torch.arange(tokens)
    for row in range(responses):
        rewards[row].zero_()
        rewards[row, lengths[row] - 1] = scores[row]
        mask[row] = positions < lengths[row]
    uids = np.array([f"prompt-{row // GROUP}" for row in range(responses)], dtype=object)
    return rewards, mask, uids


def expected_weighted(scores: np.ndarray) -> np.ndarray:
    """A-HPO's weighted advantage of each response, from its reward, with numpy. The groups are consecutive rows."""
    result = np.empty(len(scores), dtype=np.float64)
    for begin in range(0, len(scores), GROUP):
        group = scores[begin : begin + GROUP].astype(np.float64)
        spread = group.std(ddof=1) if len(group) > 1 else 0.0
        result[begin : begin + GROUP] = (group - group.mean()) / (spread + 1e-6)
    positive, negative = int((result > 0).sum()), int((result < 0).sum())
    alpha = min(1.0, max(ALPHA_MIN, positive / negative)) if negative else 1.0
    return np.where(result < 0, alpha * result, result)


def estimate(responses: int, tokens: int, folder: Path, *, seconds: float = 60.0, timed: bool = True) -> Result:
    """Time and peak memory of A-HPO's estimator with its metrics, and of verl's ``grpo``, on one batch.

    Args:
        responses: rows.
        tokens: tokens of each row.
        folder: not used.
        seconds: no round of the timing is started later.
        timed: whether it is a failure to be slower than verl.
    """
    import torch
    from omegaconf import OmegaConf
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    from benchmarks._measure import ratio, rounds
    from hpo_plugin.verl import metrics
    from hpo_plugin.verl.estimators import estimator

    what, result = f"{responses} x {tokens}", Result(inputs=1)
    # Rewards, mask, result, and verl's copy of the mask in fp32; a tenth for the rest.
    needed, available = responses * tokens * (4 + 8 + 4 + 4) * 1.1, psutil.virtual_memory().available
    if available < needed:
        needs = f"needs {needed / 2**30:.1f} GiB of memory, of which {available / 2**30:.1f} GiB are available"
        return Result(inputs=1, failures=[f"{what} {needs}"])
    rewards, mask, uids = batch(responses, tokens)
    config = OmegaConf.create(
        {
            "algorithm": {"norm_adv_by_std_in_grpo": True, "hpo": {"alpha_min": ALPHA_MIN}},
            "actor_rollout_ref": {"rollout": {"n": GROUP}},
        }
    ).algorithm
    alpha: list[float] = []

    def ours() -> torch.Tensor:
        advantages, _ = estimator("ahpo")(rewards, mask, uids, config=config)
        alpha.append(metrics.drain()["actor/hpo/alpha"])
        return advantages

    def verls() -> torch.Tensor:
        return compute_grpo_outcome_advantage(rewards, mask, uids)[0]

    # The first call imports modules and creates threads.
    estimator("ahpo")(rewards[:GROUP], mask[:GROUP], uids[:GROUP], config=config)
    metrics.drain()
    peak, found = peak_bytes(ours)
    weighted = torch.from_numpy(expected_weighted(rewards.sum(dim=-1).numpy())).float()
    for row in range(responses):
        if not torch.allclose(found[row], weighted[row] * mask[row], rtol=1e-5, atol=1e-6):
            result.failures.append(f"{what}, row {row}: not the weighted advantage")
            break
    del found
    peak_of_verl, found = peak_bytes(verls)
    del found
    size = responses * tokens * 4
    if peak - size > EXTRA_SHARE * size + EXTRA_BYTES:
        result.failures.append(f"{what}: needs {(peak - size) / MIB:.0f} MiB beyond the result")
    times = rounds({"ahpo": ours, "grpo": verls}, seconds=seconds)
    middle, low, high = ratio(times["grpo"], times["ahpo"])
    if timed and low <= 1:
        result.failures.append(f"{what}: grpo / ahpo is {middle:.2f} [{low:.2f}, {high:.2f}]: not faster than verl")
    if len(set(alpha)) != 1:
        result.failures.append(f"{what}: α differs between calls: {sorted(set(alpha))}")
    for name, value in {
        "time of `grpo` / time of `ahpo`": middle,
        "lower end of its 95 % interval": low,
        "upper end": high,
        "`ahpo` (s)": statistics.median(times["ahpo"]),
        "`ahpo` per token (ns)": statistics.median(times["ahpo"]) / responses / tokens * 1e9,
        "batch (MiB)": 3 * size / MIB,
        "peak beyond the batch, `ahpo` (MiB)": peak / MIB,
        "`grpo` (MiB)": peak_of_verl / MIB,
    }.items():
        result.measure(name, value)
    return result


# --- a cluster with many nodes -------------------------------------------------------------------------------------

HERE: dict[str, Any] = {
    "host": "head",
    "python": "3.11.7",
    "versions": {"hpo-plugin": "0.3.0", "verl": "0.9.1", "torch": "2.13.0", "ray": "2.60.0"},
    "code": "0123456789ab",
    "problems": [],
    "built_in": None,
}
ACCELERATORS = 8


@dataclass
class Nodes:
    """Stands for Ray: its nodes, and what the probe returns or raises on each.

    Attributes:
        count: Number of the nodes that are alive.
        faults: Fault -> number of living nodes that have it; see :meth:`_answer`.
        dead: Number of nodes that died before.
    """

    count: int
    faults: Mapping[str, int] = field(default_factory=dict)
    dead: int = 0

    def __post_init__(self) -> None:
        """Make the nodes; those with a fault come first."""
        self._made = 0
        self.nodes: list[dict[str, Any]] = [self._node(alive=False) for _ in range(self.dead)]
        kinds = [fault for fault, number in self.faults.items() for _ in range(number)]
        self.fault_of: dict[str, str] = {}
        for number in range(self.count):
            node = self._node(alive=True)
            self.nodes.append(node)
            if number < len(kinds):
                self.fault_of[node["NodeID"]] = kinds[number]

    def _node(self, *, alive: bool) -> dict[str, Any]:
        self._made += 1
        address = f"10.0.{self._made // 250}.{self._made % 250 + 1}"
        resources = {"CPU": 192.0, "GPU": float(ACCELERATORS), "memory": 2e12, f"node:{address}": 1.0}
        return {
            "NodeID": f"{self._made:056x}",
            "Alive": alive,
            "NodeManagerAddress": address,
            "NodeManagerHostname": f"gpu-{self._made}",
            "Resources": resources if alive else {},
        }

    def replace(self, number: int) -> None:
        """Let nodes die; as many new ones join."""
        for node in [node for node in self.nodes if node["Alive"]][:number]:
            node.update(Alive=False, Resources={})
            self.nodes.append(self._node(alive=True))

    def add(self, number: int) -> None:
        """Let nodes join."""
        self.nodes += [self._node(alive=True) for _ in range(number)]

    def _answer(self, node_id: str) -> dict[str, Any]:
        import ray

        node = next(node for node in self.nodes if node["NodeID"] == node_id)
        there = {**HERE, "host": node["NodeManagerHostname"]}
        fault = self.fault_of.get(node_id)
        if fault == "no answer":
            raise ray.exceptions.GetTimeoutError("no answer")
        if fault == "lost":
            raise ray.exceptions.RaySystemError(f"the worker {node_id} on {node['NodeManagerAddress']}:40123 crashed")
        if fault == "no plugin":
            there["versions"] = {**HERE["versions"], "hpo-plugin": None}
            there["problems"] = [("the installed packages declare no entry point hpo", "install hpo-plugin")]
        if fault == "other version":
            there["versions"] = {**HERE["versions"], "verl": "0.9.0"}
        if fault == "other code":
            there["code"] = "ba9876543210"
        return there

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put it in the place of Ray."""
        import ray

        class Remote:
            def options(self, *, scheduling_strategy: Any) -> Remote:
                self.node_id = scheduling_strategy.node_id
                return self

            def remote(self, *_: Any) -> str:
                return str(self.node_id)

        living = lambda: sum(node["Alive"] for node in self.nodes)  # noqa: E731
        with contextlib.ExitStack() as stack:
            for name, function in {
                "is_initialized": lambda: True,
                "nodes": lambda: [dict(node) for node in self.nodes],
                "available_resources": lambda: {"GPU": float(ACCELERATORS * living())},
                "remote": lambda **_: lambda function: Remote(),
                "wait": lambda answers, **_: (answers, []),
                "get": lambda answer, **_: self._answer(answer),
            }.items():
                stack.enter_context(mock.patch.object(ray, name, function))
            stack.enter_context(mock.patch.object(ray.util, "list_named_actors", return_value=[]))
            yield


def cluster_report(nodes: Nodes, config: Any) -> tuple[Any, str]:
    """The report of the checks of a cluster, and its text without a terminal."""
    from rich.console import Console

    from hpo_plugin.check.cluster import Cluster
    from hpo_plugin.check.report import CheckReport

    with nodes.installed(), Cluster.join(None) as cluster:
        cluster.ask_every_node([("data.train_files", "/data/train.parquet")])
        report = CheckReport([*cluster.check_nodes(HERE, 5.0), *cluster.check_devices(config)])
    text = io.StringIO()
    report.show(Console(file=text, width=120))
    return report, text.getvalue()


def check_cluster(count: int, folder: Path) -> Result:
    """The checks of a cluster in which some nodes are dead, do not answer, or have another installation."""
    from omegaconf import OmegaConf

    result = Result(inputs=count)
    faults = {"no answer": 3, "lost": 20, "no plugin": 5, "other version": 40, "other code": 4}
    config = OmegaConf.create({"trainer": {"nnodes": count, "n_gpus_per_node": ACCELERATORS}})
    begin, before = time.process_time(), _memory("VmRSS")
    report, text = cluster_report(Nodes(count, faults, dead=count // 64), config)
    result.measure("CPU time of the checks (s)", time.process_time() - begin)
    result.measure("lines of the report", len(text.splitlines()))
    result.measure("memory (MiB)", (_memory("VmRSS") - before) / MIB)
    # One line for each fault and one for the others; a node without the plugin has two faults.
    wanted = {*(f"{number} nodes" for number in faults.values()), f"{count - sum(faults.values())} nodes"}
    if missing := wanted - {finding.name for finding in report.findings}:
        result.failures.append(f"no line for {', '.join(sorted(missing))}:\n{text}")
    if report.ok or sum(not finding.ok for finding in report.findings) != len(faults) + 1:
        result.failures.append(f"not one failed check for each fault:\n{text}")
    check_text(result, text)
    report, text = cluster_report(Nodes(count, dead=count // 64), config)
    if not report.ok:
        result.failures.append(f"a check of a good cluster failed:\n{text}")
    check_text(result, text)
    return result


def check_text(result: Result, text: str) -> None:
    """Check that an output is short enough to be read."""
    lines = text.splitlines()
    if len(lines) > LINES:
        result.failures.append(f"{len(lines)} lines, limit {LINES}:\n{text[:2000]}")
    longest = max(lines, key=len, default="")
    if len(longest) > CHARACTERS:
        result.failures.append(f"a line of {len(longest)} characters, limit {CHARACTERS}: {longest[:300]}")


#: Stands for verl's trainer: it logs and saves each step. The first attempt hangs after two steps.
TRAINER = """
import json, os, sys, time, zipfile
from pathlib import Path

values = dict(word.partition("=")[::2] for word in sys.argv[1:])
metrics = Path(os.environ["VERL_FILE_LOGGER_PATH"])
checkpoints = Path(values["trainer.default_local_dir"])
begin = int(values.get("trainer.resume_from_path", "_-1").rpartition("_")[2]) + 1
for step in range(begin, int(values["trainer.total_training_steps"]) + 1):
    if step:
        actor = checkpoints / f"global_step_{step}" / "actor"
        actor.mkdir(parents=True, exist_ok=True)
        for kind in ("model", "optim", "extra_state"):
            zipfile.ZipFile(actor / f"{kind}_world_size_1_rank_0.pt", "w").close()
        zipfile.ZipFile(actor.parent / "data.pt", "w").close()
        (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step, "data": {"critic/rewards/mean": 0.5}}) + chr(10))
    if step == 2 and metrics.parent.name == "attempt-1":
        time.sleep(600)
"""


def launch_cluster(count: int, folder: Path) -> Result:
    """A launch that waits for nodes, loses 40 of them while it trains, and resumes with new nodes."""
    from rich.console import Console

    from hpo_plugin.check.cluster import Cluster
    from hpo_plugin.check.report import CheckReport
    from hpo_plugin.runs import launch
    from hpo_plugin.runs.verl_log import read_rows

    package = folder / "stand-in" / "verl" / "trainer"
    package.mkdir(parents=True)
    for directory in (package, package.parent):
        (directory / "__init__.py").touch()
    (package / "main_ppo.py").write_text(TRAINER, encoding="utf-8")
    lost, steps = 40, 4
    nodes = Nodes(count - lost, dead=count // 64)
    seconds: list[float] = []

    class Timed(Cluster):
        """Times what the launcher asks at intervals, and changes the cluster."""

        def lacks(self, config: Any) -> str | None:
            begin = time.process_time()
            found = super().lacks(config)
            seconds.append(time.process_time() - begin)
            if found:
                nodes.add(lost)
            return found

        def dead_nodes(self) -> dict[str, str]:
            begin = time.process_time()
            found = super().dead_nodes()
            seconds.append(time.process_time() - begin)
            attempt = folder / "run" / "attempt-1" / "metrics.jsonl"
            if len(nodes.nodes) == count + count // 64 and 2 in read_rows(attempt):
                nodes.replace(lost)
            return found

    def checks(*_: Any, local: bool, **__: Any) -> CheckReport:
        if local:
            return CheckReport([])
        cluster = Timed()
        cluster.ask_every_node()
        return CheckReport(cluster.check_nodes(HERE, 5.0))

    text, result = io.StringIO(), Result(inputs=count)
    overrides = (
        f"trainer.total_training_steps={steps}",
        "trainer.save_freq=1",
        f"trainer.nnodes={count}",
        f"trainer.n_gpus_per_node={ACCELERATORS}",
    )
    environment = {"PYTHONPATH": str(folder / "stand-in"), "RAY_ADDRESS": "10.0.0.1:6379", "VERL_PLATFORM": "cpu"}
    begin, before = time.process_time(), _memory("VmRSS")
    with contextlib.ExitStack() as stack:
        stack.enter_context(nodes.installed())
        stack.enter_context(mock.patch.dict(os.environ, environment))
        for name, value in {"Cluster": Timed, "run_checks": checks, "POLL": 0.05, "DEATH_NOTICED": 1.0}.items():
            stack.enter_context(mock.patch.object(launch, name, value))
        wanted = launch.Launch("countdown_cpu", overrides, folder / "run", 3, 60.0, 60.0, 300.0)
        run = launch.run_launch(wanted, Console(file=text, width=120))
    result.measure("CPU time of the launcher (s)", time.process_time() - begin)
    result.measure("memory (MiB)", (_memory("VmRSS") - before) / MIB)
    result.measure("slowest look at the nodes (ms)", 1000 * max(seconds))
    result.measure("lines of its output", len(text.getvalue().splitlines()))
    if sorted(run.rows()) != list(range(steps + 1)) or len(run.attempts()) != 2:
        result.failures.append(f"steps {sorted(run.rows())} in {len(run.attempts())} attempts")
    for said in (f"waiting for {count} nodes", "Ray lost 10.0.", "more", f"checked {count} nodes: all checks passed"):
        if said not in text.getvalue():
            result.failures.append(f"{said!r} is not in the output:\n{text.getvalue()}")
    check_text(result, text.getvalue())
    return result


# --- a study with many cells ---------------------------------------------------------------------------------------

ARMS = ("grpo", "gspo", "sapo", "hpo", "ahpo")
#: Logged in each step, besides what the statistics need.
OTHER_METRICS = ("actor/entropy", "actor/grad_norm", "actor/pg_clipfrac", "perf/total_num_tokens", "timing_s/gen")


def declaration(cells: int, steps: int) -> dict[str, Any]:
    """A study with at least this many cells: five arms, up to 100 seeds, and as many settings as that takes."""
    seeds = min(100, -(-cells // len(ARMS)))
    settings = [f"setting-{number}" for number in range(-(-cells // (len(ARMS) * seeds)))]
    prepare = {"task": "countdown", "train_size": 2560, "test_size": 512, "problems": {"counts": [3], "max_number": 12}}
    return {
        "name": "large",
        "title": "A large study",
        "config_name": "countdown_cpu",
        "steps": steps,
        "test_every": max(1, steps // 4),
        "settings": {
            name: {"title": name, "prepare": {**prepare, "seed": number}} for number, name in enumerate(settings)
        },
        "arms": {name: {"title": name, "overrides": [f"algorithm.policy_loss={name}"]} for name in ARMS},
        "experiments": {
            name: {
                "title": name,
                "setting": name,
                "arms": list(ARMS),
                "seeds": list(range(seeds)),
                "compare": "ahpo",
            }
            for name in settings
        },
    }


def write_study(folder: Path, cells: int, steps: int) -> Path:
    """Write a study, and the run directories of its cells as ``study run`` leaves them: all are finished.

    Args:
        folder: gets ``study.yaml`` and ``runs``.
        cells: number of cells, at least.
        steps: steps of each.

    Returns:
        The declaration.
    """
    from hpo_plugin.study.cells import Workspace
    from hpo_plugin.study.spec import load_study

    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(declaration(cells, steps), sort_keys=False), encoding="utf-8")
    workspace = Workspace(load_study(path), folder / "runs")
    digests = {}
    for number, (name, setting) in enumerate(workspace.study.settings.items()):
        assert setting.prepare is not None
        digests[name] = {file: f"{number:064x}" for file in ("train", "test", "model")}
        workspace.save_inputs(setting.prepare, digests[name], {"sampled": {"correct": 0.1}})
    machine = {"system": "Linux", "machine": "x86_64", "cores": 2, "memory_gb": 24, "python": "3.11.7"}
    done = {"steps": steps, "wall_seconds": 100.0, "machine": machine, "versions": {"verl": "0.9.1", "torch": "2.13.0"}}
    numbers = np.random.default_rng(0)
    for cell in workspace.study.cells():
        directory = workspace.directory / "cells" / f"{cell.setting}-{cell.arm}-seed{cell.seed}-{cell.key}"
        attempt = directory / "attempt-1"
        attempt.mkdir(parents=True)
        request = {"cell": cell.request(), "inputs": digests[cell.setting], "hpo_plugin": "0.3.0"}
        (directory / "request.json").write_text(json.dumps(request), encoding="utf-8")
        (directory / "result.json").write_text(json.dumps(done), encoding="utf-8")
        (attempt / "attempt.json").write_text('{"resumed_from": null}', encoding="utf-8")
        (attempt / "metrics.jsonl").write_text(_log(numbers, steps, workspace.study.test_every), encoding="utf-8")
    return path


def _log(numbers: np.random.Generator, steps: int, test_every: int) -> str:
    """A log in the form of verl's file logger."""
    lines = []
    for step, values in enumerate(numbers.random((steps + 1, 3 + len(OTHER_METRICS))).round(6).tolist()):
        reward, length, alpha, *others = values
        data = dict(zip(OTHER_METRICS, others, strict=True)) if step else {}
        if step:
            data |= {"critic/rewards/mean": reward, "response_length/mean": 20 * length, "timing_s/step": 1.5}
            data |= {"actor/hpo/alpha": alpha, "actor/hpo/share_positive": 0.2, "actor/hpo/share_negative": 0.5}
        if step % test_every == 0 or step == steps:
            data["val-core/countdown/reward/mean@1"] = reward
        lines.append(json.dumps({"step": step, "data": data}))
    return "\n".join(lines) + "\n"


def fail_cells(folder: Path, number: int) -> None:
    """Make finished cells of a written study failed ones."""
    for directory in sorted((folder / "runs" / "large" / "cells").iterdir())[:number]:
        (directory / "result.json").unlink()
        text = "The trainer failed (exit status 1).\nCause: OSError: no space left\nThe end of trainer.log:\n"
        failure = {"error": text + "  a line of the log\n" * 15}
        (directory / "failed.json").write_text(json.dumps(failure), encoding="utf-8")


@dataclass(frozen=True)
class Command:
    """What a command took.

    Attributes:
        seconds: CPU time.
        peak: Largest resident memory, in bytes.
        text: Its output.
    """

    seconds: float
    peak: int
    text: str


def run_command(*arguments: str) -> Command:
    """Run ``hpo-plugin`` in a process of its own.

    Raises:
        RuntimeError: The exit status is not 0.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "hpo_plugin.cli", *arguments], stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit status {process.returncode}\n{text[-2000:]}")
    return Command(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, text)


def study(cells: int, steps: int, folder: Path, *, failed: int = 500) -> Result:
    """``status``, ``collect`` and ``report`` of a study with many finished cells, and ``status`` after failures."""
    path, result = write_study(folder, cells, steps), Result(inputs=cells)
    output = f"--output={folder / 'runs'}"
    commands = {
        "status": ["status", str(path), output],
        "collect": ["collect", str(path), output],
        "collect again": ["collect", str(path), output],
        "report": ["report", str(path), f"--output={folder / 'report'}", "--no-png"],
        "status with failures": ["status", str(path), output, f"--data={folder / 'none.parquet'}"],
    }
    expected = {
        "status": f"{cells} finished",
        "collect": f"added: {cells} ",
        "collect again": f"unchanged: {cells}",
        "report": "large.md",
        "status with failures": f"{failed} failed, {cells - failed} finished",
    }
    for name, arguments in commands.items():
        if name == "status with failures":
            fail_cells(folder, failed)
        done = run_command("study", *arguments)
        result.measure(f"{name}: CPU time (s)", done.seconds)
        result.measure(f"{name}: peak memory (MiB)", done.peak / MIB)
        if expected[name] not in done.text:
            result.failures.append(f"{name}: {expected[name]!r} is not in the output:\n{done.text[-1000:]}")
        if done.peak > STUDY_MIB * MIB:
            result.failures.append(f"{name}: {done.peak / MIB:.0f} MiB, limit {STUDY_MIB}")
        if name.startswith("status"):
            # A row for each arm in each setting.
            lines = len(done.text.splitlines()) - len(ARMS) * len(declaration(cells, steps)["settings"])
            if lines > LINES:
                result.failures.append(f"{name}: {lines} lines besides the table, limit {LINES}")
        else:
            check_text(result, done.text)
    result.measure("data file (MB)", path.with_suffix(".parquet").stat().st_size / 1e6)
    return result


SIZES = ((1024, 32768), (4096, 32768), (16384, 8192), (16384, 32768))
PROBES = (
    *(
        Probe(
            f"estimator-{responses}x{tokens}",
            "scale",
            f"advantages and metrics of {responses:,} responses of {tokens:,} tokens, against verl's `grpo`",
            "the values of a reference in NumPy; faster than `grpo`; additional memory below the bound",
            {"one": partial(estimate, responses, tokens)},
        )
        for responses, tokens in SIZES
    ),
    Probe(
        "check-512-nodes",
        "scale",
        "`check` with a stand-in for Ray with 512 nodes of 8 GPUs; nodes are dead, do not answer, or lack the plugin",
        "one line for all nodes with the same finding; the report has at most 60 lines",
        {"one": partial(check_cluster, 512)},
    ),
    Probe(
        "launch-512-nodes",
        "scale",
        "`launch` with the same stand-in: waits for 40 nodes, loses 40 nodes while it trains",
        "waits, resumes with the new nodes, has each step once; the output has at most 60 lines",
        {"one": partial(launch_cluster, 512)},
    ),
    Probe(
        "study-10000-cells",
        "scale",
        "`study status`, `collect` and `report` with the logs of 10,000 cells; `status` with 500 failed cells",
        "every cell is counted; at most 2 GiB of memory; failures with the same cause are shown once",
        {"one": partial(study, 10_000, 60)},
        limit=4 * 3600.0,
    ),
)
