"""A training on a Ray cluster: waits for its nodes, checks all of them, trains, and resumes where a node was lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console

import hpo_plugin
from hpo_plugin.check.checks import quiet, run_checks
from hpo_plugin.check.cluster import Cluster
from hpo_plugin.check.compose import compose
from hpo_plugin.check.report import CheckReport
from hpo_plugin.configs import renamed
from hpo_plugin.errors import ConfigError
from hpo_plugin.runs.directory import Attempt, Run, RunBusyError, write_json
from hpo_plugin.runs.process import end_leftovers
from hpo_plugin.runs.training import SAVE_EVERY, Training, TrainingError, outcome, train, trainer_command, write_metrics
from hpo_plugin.runs.verl_log import MetricsFile, StepView, read_rows
from hpo_plugin.verl.presets import preset_of

#: Seconds between two looks at the cluster.
POLL = 5.0
#: Seconds after which Ray has noticed the death of a node's processes: it asks for a sign of them every three seconds,
#: and gives a node up after five without one. Until then the node counts as alive, beside the one in its place.
DEATH_NOTICED = 30.0
#: What the launcher sets in every attempt.
OWN_KEYS = ("trainer.default_local_dir", "trainer.resume_mode", "trainer.resume_from_path", "hydra.run.dir")
#: What may change between two calls for one run: how long it trains, where, and what is kept of it.
FREE_KEYS = (
    "ray_kwargs.",
    "hydra.",
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "trainer.save_freq",
    "trainer.test_freq",
    "trainer.logger",
    "trainer.max_actor_ckpt_to_keep",
    "trainer.max_critic_ckpt_to_keep",
)
#: Arguments of ``ray.init`` for which there is no place where a cluster runs already.
_OF_A_NEW_CLUSTER = ("num_cpus", "num_gpus", "object_store_memory", "resources")


@dataclass(frozen=True)
class Launch:
    """What is asked for.

    Attributes:
        config_name: As ``python -m verl.trainer.main_ppo --config-name`` is given.
        overrides: Hydra overrides.
        directory: Of the run, on a file system that all nodes share.
        retries: Starts after failures in a row without a new checkpoint, before giving up.
        wait: Seconds to wait for nodes.
        timeout: Seconds a node has to answer the checks.
        stall: Seconds without a step after which the trainer is ended.
    """

    config_name: str
    overrides: tuple[str, ...]
    directory: Path
    retries: int
    wait: float
    timeout: float
    stall: float

    def request(self) -> dict[str, Any]:
        """What identifies the run, as JSON values, with the version that made it."""
        return {
            "config_name": self.config_name,
            "overrides": list(self.overrides),
            "hpo_plugin": hpo_plugin.__version__,
        }


def run_launch(launch: Launch, console: Console) -> Run:
    """Do everything.

    Args:
        launch: What is asked for.
        console: Where to tell about it.

    Returns:
        The finished run.

    Raises:
        TrainingError: It could not be finished.
        KeyboardInterrupt: Interrupted; the trainer has stopped, and the same call resumes the run.
    """
    launcher = _Launcher(launch, console)
    try:
        launch.directory.mkdir(parents=True, exist_ok=True)
        with launcher.run.locked():
            try:
                launcher.go()
            except TrainingError as error:
                launcher.run.fail(str(error))
                raise
    except (RunBusyError, OSError, ValueError) as error:
        raise TrainingError(f"{type(error).__name__}: {error}") from error
    return launcher.run


class _Launcher:
    def __init__(self, launch: Launch, console: Console) -> None:
        self.launch = launch
        self.run = Run(launch.directory)
        self.console = console
        refuse_own_keys(launch.overrides)
        self.overrides = [*launch.overrides, *cluster_overrides(self._compose(launch.overrides), os.environ)]
        self.config = self._compose(self.overrides)
        require_cluster(self.config)
        self.training = plan(self.config, launch.config_name, self.overrides)
        # Of the failures in a row.
        self._failures = 0
        self._reached: int | None = None
        self._cause = ""
        self._cluster = Cluster()
        # Ids of the cluster's nodes when the trainer was last started.
        self._nodes: set[str] = set()
        self._looked = 0.0

    def tell(self, text: str) -> None:
        """Print a line with the time of day: it is read in the log of a job, later."""
        self.console.print(f"{time.strftime('%H:%M:%S')}  {text}", markup=False, highlight=False, soft_wrap=True)

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        config, finding = compose(self.launch.config_name, overrides)
        if config is None:
            raise TrainingError(f"{finding.found}: {finding.remedy}")
        try:
            preset_of(config)
        except ConfigError as error:
            raise TrainingError(str(error)) from error
        return config

    def go(self) -> None:
        """All steps, in order. The caller holds the run's lock."""
        request = self.run.directory / "launch.json"
        try:
            refuse_another_run(json.loads(request.read_bytes()), self.launch.request(), self.run.directory)
            self.tell(f"run {self.run.directory}, resumed")
        except FileNotFoundError:
            write_json(request, self.launch.request())
            self.tell(f"run {self.run.directory}")
        if self.run.finished and (self.training.steps is None or self.training.done(self.run)):
            self.tell("it is finished already")
            return
        end_leftovers(self.run.processes)
        # What can be seen without a cluster, before one is waited for.
        self._require(self._report(), "this node and the config")
        with self._joined() as self._cluster:
            if not self.training.done(self.run):
                self._check_nodes()
            train(
                self.run,
                self.training,
                stall=self.launch.stall,
                screen=lambda attempt: _StepLines(self),
                tell=self.tell,
                again=self._again,
            )
        self._finish()

    # --- before each start of the trainer ---

    @contextlib.contextmanager
    def _joined(self) -> Iterator[Cluster]:
        """The cluster, once it can be joined."""
        deadline = time.monotonic() + self.launch.wait
        while True:
            with Cluster.join(self.config) as cluster:
                if cluster.failure is None:
                    yield cluster
                    return
            if time.monotonic() > deadline:
                raise TrainingError(f"the Ray cluster {cluster.failure.found}: {cluster.failure.remedy}")
            self.tell(f"waits for the Ray cluster, which {cluster.failure.found}")
            time.sleep(POLL)

    def _wait(self) -> None:
        """Wait for what the run needs."""
        deadline = time.monotonic() + self.launch.wait
        told = None
        while lacks := self._cluster.lacks(self.config):
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"waited {self.launch.wait:g} s (--wait-for-nodes) for {lacks}. The run asks for them with "
                    "trainer.nnodes and trainer.n_gpus_per_node"
                )
            if lacks != told:
                self.tell(f"waits for {lacks}")
                told = lacks
            time.sleep(min(POLL, max(0.1, deadline - time.monotonic())))

    def _check_nodes(self) -> None:
        """Wait for the nodes and check all of them; once more where one died meanwhile: that is no fault of the run."""
        token = self.run.directory / "shared"
        token.touch()
        losses = 0
        while True:
            known = self._cluster.dead_nodes().keys()
            self._wait()
            report = self._report(token.resolve())
            lost = self._died_since(known, report)
            if not lost:
                break
            losses += 1
            if losses > self.launch.retries:
                raise TrainingError(
                    f"Ray lost {lost} while the nodes were checked, {losses} times in a row (--retries). "
                    "The trainer was not started"
                )
            self.tell(f"Ray has lost {lost} while the nodes were checked; they are checked again")
        self._nodes = self._cluster.living_nodes()
        self._require(report, f"{len(self._nodes)} nodes")

    def _died_since(self, known: Set[str], report: CheckReport) -> str:
        """Addresses of the nodes that died during the checks."""

        def died() -> str:
            dead = self._cluster.dead_nodes()
            return ", ".join(sorted({dead[node] for node in dead.keys() - known}))

        failed = any(finding.name.startswith("node ") for finding in report.findings if not finding.ok)
        return self._once_noticed(died) if failed else died()

    @staticmethod
    def _once_noticed(lost: Callable[[], str]) -> str:
        """Ask for lost nodes until there are some, or Ray would know of them."""
        deadline = time.monotonic() + DEATH_NOTICED
        while not (found := lost()) and time.monotonic() < deadline:
            time.sleep(POLL)
        return found

    def _report(self, shared: Path | None = None) -> CheckReport:
        """Run the checks: on all nodes where a file is given that they have to share, else on this one."""
        with quiet(self.run.directory / "check.log"):
            return run_checks(
                self.launch.config_name,
                self.overrides,
                timeout=self.launch.timeout,
                local=shared is None,
                shared=shared,
            )

    def _require(self, report: CheckReport, checked: str) -> None:
        if not report.ok:
            report.show(self.console)
            raise TrainingError(
                "The checks failed; see the remedy below each failed check. The trainer was not started."
            )
        self.tell(f"checked {checked}: {report.summary}")

    # --- while it trains, and after a failure ---

    def lost_nodes(self) -> str:
        """Addresses of the nodes that died since the trainer was started."""
        dead = self._cluster.dead_nodes()
        return ", ".join(sorted(dead[node] for node in self._nodes & dead.keys()))

    def watch(self) -> None:
        """Look at the nodes now and then.

        verl does not end by itself where a node is lost: it waits forever for samples that were on it
        (``ReplayBuffer.sample``), or for its part of a collective operation.

        Raises:
            TrainingError: A node died.
        """
        if time.monotonic() - self._looked < POLL:
            return
        self._looked = time.monotonic()
        if lost := self.lost_nodes():
            raise TrainingError(f"Ray lost {lost}", f"Ray lost {lost}")

    def _again(self, attempt: Attempt, error: TrainingError) -> bool:
        """Whether to start again; if so, the nodes are there and checked."""
        self.tell(f"the trainer failed: {error.cause}")
        reached = self.run.resume_step()
        if reached != self._reached:
            self._reached, self._failures, self._cause = reached, 0, ""
        self._failures += 1
        if self._failures > self.launch.retries:
            self.tell(f"gives up: {self._failures} failures in a row without a new checkpoint (--retries)")
            return False
        # What a node that has just died held is in use until Ray, after some seconds without a sign of it, says so.
        self._wait()
        # Addresses, ids and times of the same failure differ.
        cause = re.sub(r"[0-9a-f]{8,}|\d+", "#", error.cause)
        repeated = cause == self._cause and not any(read_rows(attempt.metrics))
        if lost := self._once_noticed(self.lost_nodes) if repeated else self.lost_nodes():
            self.tell(f"Ray has lost {lost}")
        elif repeated:
            self.tell("gives up: the same failure twice, no node lost, and no step completed in between")
            return False
        self._cause = cause
        self._check_nodes()
        self.tell(f"starts again, {self._failures} of {self.launch.retries}")
        return True

    # --- at the end ---

    def _finish(self) -> None:
        steps = max(self.run.rows())
        write_metrics(self.run, steps, self.training.first_step)
        command = trainer_command(self.launch.config_name, list(self.launch.overrides))
        attempts = [attempt.resumed_from for attempt in self.run.attempts()]
        self.run.finish(
            {
                "request": self.launch.request(),
                **outcome(self.run, steps),
                "attempts_resumed_from": attempts,
                "command": command,
            }
        )
        self.tell(f"finished: {steps} steps in {len(attempts)} attempts; {self.run.directory / 'metrics.jsonl'}")


class _StepLines:
    """A line for each step, and a look at the nodes."""

    def __init__(self, launcher: _Launcher) -> None:
        self._launcher = launcher

    def __enter__(self) -> _StepLines:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def show(self, metrics: MetricsFile) -> bool:
        self._launcher.watch()
        rows = metrics.new_rows()
        for step, values in rows:
            if step > 0:
                self._launcher.tell(StepView.of(step, values).line(self._launcher.training.steps or step))
        return bool(rows)


# --- the config ----------------------------------------------------------------------------------------------------


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def refuse_own_keys(overrides: Sequence[str]) -> None:
    """Refuse overrides of what the launcher sets.

    Raises:
        TrainingError: With the key.
    """
    for override in overrides:
        if _key(override) in OWN_KEYS:
            raise TrainingError(
                f"{override}: the launcher sets {_key(override)}, in the directory of --run-dir; leave it out"
            )


def refuse_another_run(known: Mapping[str, Any], asked: Mapping[str, Any], directory: Path) -> None:
    """Refuse to resume a run under another config.

    Args:
        known: The request of the run in the directory.
        asked: The request of this call.
        directory: For the message.

    Raises:
        TrainingError: With what differs.
    """

    def binding(request: Mapping[str, Any]) -> list[str]:
        named = [renamed(word) for word in request.get("overrides", ()) if not _key(word).startswith(FREE_KEYS)]
        return [f"--config-name={request.get('config_name')}", *named]

    before, now = binding(known), binding(asked)
    if before != now:
        changed = [f"- {word}" for word in before if word not in now]
        changed += [f"+ {word}" for word in now if word not in before]
        raise TrainingError(
            f"{directory} holds a run that was started with other arguments:\n"
            + "\n".join(changed or ["the same ones in another order"])
            + "\nTake another --run-dir, or the arguments in its launch.json."
        )


def cluster_overrides(config: DictConfig, environment: Mapping[str, str]) -> list[str]:
    """What makes a config join the cluster of ``RAY_ADDRESS`` instead of starting one of its own.

    Args:
        config: A whole verl config.
        environment: Of this process.

    Returns:
        Hydra overrides; none where the variable is not set.
    """
    address = environment.get("RAY_ADDRESS")
    if not address:
        return []
    given = OmegaConf.select(config, "ray_kwargs.ray_init") or OmegaConf.create()
    # Unresolved: verl's plugins, which register resolvers, are not loaded in this process.
    as_written = OmegaConf.to_container(given, resolve=False)
    assert isinstance(as_written, dict)
    dropped = [key for key in _OF_A_NEW_CLUSTER if as_written.get(key) is not None]
    return [f"++ray_kwargs.ray_init.address='{address}'", *(f"ray_kwargs.ray_init.{key}=null" for key in dropped)]


def require_cluster(config: DictConfig) -> None:
    """Refuse a config under which each process would start a Ray of its own.

    Raises:
        TrainingError: With what to set.
    """
    key = "ray_kwargs.ray_init.address"
    address = OmegaConf.select(config, key)
    if address in (None, "", "local"):
        raise TrainingError(
            f"{key} is {address!r} and RAY_ADDRESS is not set, so there is no Ray cluster to train on: set "
            "RAY_ADDRESS, to auto on a node of a running cluster. On a single machine, `ray start --head` starts one"
        )


def plan(config: DictConfig, config_name: str, overrides: Sequence[str]) -> Training:
    """What to train, and the launcher's own settings where the config has none.

    Args:
        config: A whole verl config.
        config_name: Its name.
        overrides: What it was composed with.

    Raises:
        TrainingError: The config leaves nothing to resume from.
    """
    trainer = config.trainer
    for key in ("max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep"):
        if trainer.get(key) == 1:
            raise TrainingError(
                f"trainer.{key}=1: verl saves a step before it logs it, so the checkpoint before the newest is needed "
                f"to lose no step; set trainer.{key}=2 or more"
            )
    own = []
    saves = int(trainer.save_freq) > 0
    if not saves and trainer.get("max_actor_ckpt_to_keep") is None:
        # Nobody asked for these checkpoints, so no more of them are kept than it takes to resume.
        own += ["trainer.max_actor_ckpt_to_keep=2", "trainer.max_critic_ckpt_to_keep=2"]
    loggers = list(trainer.logger) if isinstance(trainer.logger, ListConfig) else [trainer.logger]
    if "file" not in loggers:
        loggers.append("file")
    own.append(f"trainer.logger=[{','.join(loggers)}]")
    # Those of the config that are no longer true once the launcher has decided.
    kept = [word for word in overrides if _key(word) not in ("trainer.logger", "trainer.save_freq")]
    steps = trainer.get("total_training_steps")
    return Training(
        config_name=config_name,
        overrides=(*kept, *own),
        steps=None if steps is None else int(steps),
        save_every=int(trainer.save_freq) if saves else SAVE_EVERY,
        first_step=0 if trainer.get("val_before_train", True) else 1,
    )
