"""Runs the commands of hpo-plugin in one process, and records what each of them writes and connects to.

    python watched.py WORK MODEL

WORK has the inputs that tests/security/test_security.py makes. Every command writes to ``WORK/out/<name>``. The records
are printed as JSON in the last line.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import pkgutil
import socket
import sys
from pathlib import Path

WORK, MODEL = map(Path, sys.argv[1:])
OUT = WORK / "out"
#: Command -> kind of event -> details.
RECORDS: dict[str, dict[str, list[str]]] = {}
_NOW: list[str] = []
#: Event -> positions of the paths that it writes, and of the descriptor of the directory that they are relative to.
_PATHS = {
    "os.mkdir": ((0,), 2),
    "os.rename": ((0, 1), None),
    "os.remove": ((0,), 1),
    "os.rmdir": ((0,), 1),
    "os.link": ((1,), None),
    "os.symlink": ((1,), None),
    "os.truncate": ((0,), None),
    "os.chmod": ((0,), 2),
    "os.utime": ((0,), None),
}


def _absolute(path, directory=-1):
    base = os.readlink(f"/proc/self/fd/{directory}") if isinstance(directory, int) and directory >= 0 else os.getcwd()
    return os.path.normpath(os.path.join(base, os.fsdecode(path)))


def _watch(event, arguments):
    if not _NOW:
        return
    record = RECORDS[_NOW[0]]
    if event == "open":
        path, mode, flags = arguments
        writes = set(mode) & set("wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
        if writes and not isinstance(path, int):
            record["writes"].append(_absolute(path))
    elif event in _PATHS:
        positions, at = _PATHS[event]
        for position in positions:
            if not isinstance(arguments[position], int):
                record["writes"].append(_absolute(arguments[position], -1 if at is None else arguments[at]))
    elif event in ("socket.connect", "socket.sendto"):
        record["network"].append(str(arguments[1]))
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        record["network"].append(str(arguments[0]))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        record["processes"].append(" ".join(map(str, arguments[1])) if event != "os.system" else str(arguments[0]))


@contextlib.contextmanager
def watched(name):
    """Record the events of a block."""
    RECORDS[name] = {"writes": [], "network": [], "processes": [], "skipped": []}
    (OUT / name).mkdir(parents=True)
    _NOW.append(name)
    try:
        yield OUT / name, RECORDS[name]
    finally:
        _NOW.clear()


def call(name, *arguments):
    """Run a command, which must succeed."""
    from hpo_plugin.cli.app import app

    with watched(name) as (out, _):
        status = app([argument.format(out=out) for argument in map(str, arguments)], standalone_mode=False)
        assert not status, (name, status)


sys.addaudithook(_watch)
# Every module, verl and the plugins that it loads included. The packages of other extras are not installed.
with watched("import") as (_, record):
    import verl  # noqa: F401

    import hpo_plugin

    for module in pkgutil.walk_packages(hpo_plugin.__path__, "hpo_plugin."):
        if module.name.endswith("__main__"):
            continue
        # Without vLLM, verl's modules for it raise a ValueError.
        if module.name == "hpo_plugin.cpu.vllm_worker" and importlib.util.find_spec("vllm") is None:
            record["skipped"].append(f"{module.name}: vllm")
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            record["skipped"].append(f"{module.name}: {error.name}")

# The events of a connection are seen: no program listens at this port.
with watched("control"), contextlib.suppress(OSError):
    socket.create_connection(("localhost", 1)).close()
call("prepare", "prepare", "countdown", "--output={out}", "--train-size=64", "--test-size=8", "--layout=terse")
call("prepare-telelogs", "prepare", "telelogs", "--output={out}", "--train-size=8", "--test-size=8")
call("preview", "preview", WORK / "rollouts.jsonl", "--output={out}", f"--tokenizer={MODEL}")
call("report", "study", "report", WORK / "study.yaml", "--output={out}")
call("files", "files", "{out}")
DATA = [f"data.train_files={OUT}/prepare/train.parquet", f"data.val_files={OUT}/prepare/test.parquet"]
OVERRIDES = [*DATA, f"actor_rollout_ref.model.path={MODEL}", "data.train_batch_size=8"]
OVERRIDES += ["actor_rollout_ref.actor.ppo_mini_batch_size=8", "trainer.total_training_steps=1"]
call("check", "check", "--local", "--config-name=countdown_cpu", *OVERRIDES)

with watched("simulator") as (out, _):
    from hpo_plugin.study.simulated import simulate_cell

    simulate_cell("countdown_cpu", OVERRIDES, {}, out / "metrics.jsonl")

# From here on, verl's trainer is a program that writes metrics.
os.environ["PYTHONPATH"] = str(WORK / "stand-in")

with watched("quickstart") as (out, _):
    from hpo_plugin.console import terminal
    from hpo_plugin.quickstart import run as quickstart
    from hpo_plugin.quickstart.form import Inputs
    from hpo_plugin.runs.directory import RunRequest, choose_run
    from hpo_plugin.tasks.task import load_task

    plain = terminal(highlight=False)
    request = RunRequest("ahpo", seed=0, steps=4, rollout="hf", n_test=8, overrides=("+note=in-an-override",))
    run, _ = choose_run(out, request)
    inputs = Inputs(OUT / "prepare" / "train.parquet", OUT / "prepare" / "test.parquet", MODEL, {})
    training = quickstart.training_of(load_task("countdown"), request, inputs)
    with run.locked():
        quickstart._train(run, training, request, stall=60, console=plain)
        quickstart._finish(run, "Countdown", training, request, seconds=1.0, console=plain)

with watched("launch") as (out, _):
    from hpo_plugin.check.report import CheckReport, Finding
    from hpo_plugin.runs import launch

    class Cluster(launch.Cluster):
        """A cluster with all that a run needs."""

        @classmethod
        @contextlib.contextmanager
        def join(cls, config):
            """Join nothing."""
            yield cls()

        lacks = lambda self, config: None  # noqa: E731
        dead_nodes = lambda self: {}  # noqa: E731
        living_nodes = lambda self: {"a"}  # noqa: E731

    launch.Cluster = Cluster
    launch.run_checks = lambda *arguments, **options: CheckReport([Finding("all", "fine")])
    os.environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    wanted = launch.Launch("countdown_cpu", tuple([*OVERRIDES, "trainer.total_training_steps=4"]), out, 0, 1, 60, 60)
    launch.run_launch(wanted, plain)

from hpo_plugin.study import inputs as study_inputs  # noqa: E402

study_inputs.prepare_in_child = lambda *arguments, **options: None
STUDY = [WORK / "study.yaml", "--output={out}/../study-run"]
(WORK / "study.parquet").rename(WORK / "reported.parquet")
call("study-run", "study", "run", *STUDY, "--only=easy/seed0")
call("study-status", "study", "status", *STUDY)
call("study-collect", "study", "collect", *STUDY, "--data={out}/study.parquet")
call("study-print", "study", "run", *STUDY, "--only=easy/seed1", "--print")
print(json.dumps(RECORDS))
