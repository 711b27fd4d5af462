"""Trains on a Ray cluster: waits for the nodes, checks them, trains, and resumes the run after the loss of a node."""

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
from hpo_plugin.console import listed
from hpo_plugin.errors import ConfigError
from hpo_plugin.runs.directory import Attempt, Run, RunBusyError, write_json
from hpo_plugin.runs.process import end_leftovers
from hpo_plugin.runs.training import (
    SAVE_EVERY,
    TooFewStepsError,
    Training,
    TrainingError,
    outcome,
    train,
    trainer_command,
    write_metrics,
)
from hpo_plugin.runs.verl_log import MetricsFile, StepView, read_rows
from hpo_plugin.verl.presets import preset_of

#: Interval of the checks of the cluster, in seconds.
POLL = 5.0
#: Time after which Ray has detected the death of a node, in seconds. Ray checks a node every three seconds and declares
#: it dead after five failures. Until then the node counts as alive, together with its replacement.
DEATH_NOTICED = 30.0
#: Keys that the launcher sets in every attempt.
OWN_KEYS = ("trainer.default_local_dir", "trainer.resume_mode", "trainer.resume_from_path", "hydra.run.dir")
#: Keys that may change between two calls for one run: the length of the run, its cluster, and what it keeps.
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
#: Arguments of ``ray.init`` that Ray rejects when it joins a running cluster.
_OF_A_NEW_CLUSTER = ("num_cpus", "num_gpus", "object_store_memory", "resources")


@dataclass(frozen=True)
class Launch:
    """The arguments of a launch.

    Attributes:
        config_name: Name of the trainer config, as for ``python -m verl.trainer.main_ppo --config-name``.
        overrides: Hydra overrides.
        directory: Run directory, on a file system that all nodes share.
        retries: Maximum number of restarts after consecutive failures without a new checkpoint.
        wait: Maximum time to wait for nodes, in seconds.
        timeout: Time limit for the checks of a node, in seconds.
        stall: Time without a step after which the launcher stops the trainer, in seconds.
    """

    config_name: str
    overrides: tuple[str, ...]
    directory: Path
    retries: int
    wait: float
    timeout: float
    stall: float

    def request(self) -> dict[str, Any]:
        """The arguments that identify the run, as JSON values, with the version of this package."""
        return {
            "config_name": self.config_name,
            "overrides": list(self.overrides),
            "hpo_plugin": hpo_plugin.__version__,
        }


def run_launch(launch: Launch, console: Console) -> Run:
    """Train to the last step.

    Args:
        launch: The arguments.
        console: The console for progress lines.

    Returns:
        The finished run.

    Raises:
        TrainingError: The run failed.
        KeyboardInterrupt: The call was interrupted. The trainer has stopped, and the same call resumes the run.
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
        # Consecutive failures: their number, the step of the last checkpoint, and the cause of the last one.
        self._failures = 0
        self._reached: int | None = None
        self._cause = ""
        self._cluster = Cluster()
        # Ids of the cluster's nodes at the last start of the trainer.
        self._nodes: set[str] = set()
        self._looked = 0.0

    def tell(self, text: str) -> None:
        """Print a line with the time of day, for the log of a job."""
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
        """Run all steps in order. The caller has locked the run."""
        request = self.run.directory / "launch.json"
        try:
            refuse_another_run(json.loads(request.read_bytes()), self.launch.request(), self.run.directory)
            self.tell(f"resuming the run {self.run.directory}")
        except FileNotFoundError:
            write_json(request, self.launch.request())
            self.tell(f"starting the run {self.run.directory}")
        if self.run.finished and self._nothing_left():
            self.tell("the run is already finished")
            return
        end_leftovers(self.run.processes)
        # Checks that need no cluster run before the launcher waits for one.
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

    def _nothing_left(self) -> bool:
        """Whether a finished run has all steps of this call, or all epochs if their number determines the steps."""
        if self.training.steps is not None:
            return self.training.done(self.run)
        epochs = int(self.config.trainer.total_epochs)
        return epochs <= int(self.run.result().get("epochs", epochs))

    # --- before each start of the trainer ---

    @contextlib.contextmanager
    def _joined(self) -> Iterator[Cluster]:
        """Wait for the cluster and connect to it."""
        deadline = time.monotonic() + self.launch.wait
        while True:
            with Cluster.join(self.config) as cluster:
                if cluster.failure is None:
                    yield cluster
                    return
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"waited {self.launch.wait:g} s (--wait-for-nodes) for the Ray cluster, which "
                    f"{cluster.failure.found}. To fix it, {cluster.failure.remedy}."
                )
            self.tell(f"waiting for the Ray cluster, which {cluster.failure.found}")
            time.sleep(POLL)

    def _wait(self) -> None:
        """Wait for the nodes and accelerators that the run needs."""
        deadline = time.monotonic() + self.launch.wait
        told = None
        while lacks := self._cluster.lacks(self.config):
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"waited {self.launch.wait:g} s (--wait-for-nodes) for {lacks}. Add nodes, increase "
                    "--wait-for-nodes, or change trainer.nnodes and trainer.n_gpus_per_node."
                )
            if lacks != told:
                self.tell(f"waiting for {lacks}")
                told = lacks
            time.sleep(min(POLL, max(0.1, deadline - time.monotonic())))

    def _check_nodes(self) -> None:
        """Wait for the nodes and check all of them. If a node dies during the checks, wait and check again."""
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
                    f"Ray lost {lost} during the checks, {losses} times in a row (--retries={self.launch.retries}). "
                    "The trainer was not started. Check the Ray logs of these nodes."
                )
            self.tell(f"Ray has lost {lost} during the checks; checking the nodes again")
        self._nodes = self._cluster.living_nodes()
        self._require(report, f"{len(self._nodes)} nodes")

    def _died_since(self, known: Set[str], report: CheckReport) -> str:
        """Addresses of the nodes that died during the checks."""

        def died() -> str:
            dead = self._cluster.dead_nodes()
            return listed(sorted({dead[node] for node in dead.keys() - known}))

        failed = any(re.match(r"node |\d+ nodes", finding.name) for finding in report.findings if not finding.ok)
        return self._once_noticed(died) if failed else died()

    @staticmethod
    def _once_noticed(lost: Callable[[], str]) -> str:
        """Look for lost nodes until there are some, or until Ray must have detected them."""
        deadline = time.monotonic() + DEATH_NOTICED
        while not (found := lost()) and time.monotonic() < deadline:
            time.sleep(POLL)
        return found

    def _report(self, shared: Path | None = None) -> CheckReport:
        """Run the checks: on all nodes if a shared file is given, otherwise in this process."""
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
                "The checks failed. The line below each failed check states what to do. The trainer was not started."
            )
        self.tell(f"checked {checked}: {report.summary}")

    # --- while it trains, and after a failure ---

    def lost_nodes(self) -> str:
        """Addresses of the nodes that died since the trainer was started."""
        dead = self._cluster.dead_nodes()
        return listed(sorted(dead[node] for node in self._nodes & dead.keys()))

    def watch(self) -> None:
        """Check the nodes at intervals.

        verl does not stop if a node is lost: it waits forever for samples of that node (``ReplayBuffer.sample``), or
        for its part of a collective operation.

        Raises:
            TrainingError: A node died.
        """
        if time.monotonic() - self._looked < POLL:
            return
        self._looked = time.monotonic()
        if lost := self.lost_nodes():
            raise TrainingError(f"Ray lost {lost}", f"Ray lost {lost}")

    def _again(self, attempt: Attempt, error: TrainingError) -> bool:
        """Whether to restart the trainer; if so, the nodes are available and checked."""
        self.tell(f"the trainer failed: {error.cause}")
        if isinstance(error, TooFewStepsError):
            return False
        reached = self.run.resume_step()
        if reached != self._reached:
            self._reached, self._failures, self._cause = reached, 0, ""
        self._failures += 1
        if self._failures > self.launch.retries:
            self.tell(
                f"giving up after {self._failures} failures in a row without a new checkpoint "
                f"(--retries={self.launch.retries})"
            )
            return False
        # The resources of a dead node count as used until Ray detects its death, which takes some seconds.
        self._wait()
        # The same failure can have other addresses, ids and times.
        cause = re.sub(r"[0-9a-f]{8,}|\d+", "#", error.cause)
        repeated = cause == self._cause and not any(read_rows(attempt.metrics))
        if lost := self._once_noticed(self.lost_nodes) if repeated else self.lost_nodes():
            self.tell(f"Ray has lost {lost}")
        elif repeated:
            self.tell("giving up: the same failure occurred twice, without a lost node and without a completed step")
            return False
        self._cause = cause
        self._check_nodes()
        self.tell(f"restarting the trainer, {self._failures} of {self.launch.retries} retries")
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
                "epochs": int(self.config.trainer.total_epochs),
                "attempts_resumed_from": attempts,
                "command": command,
            }
        )
        self.tell(f"finished: {steps} steps in {len(attempts)} attempts; {self.run.directory / 'metrics.jsonl'}")


class _StepLines:
    """Prints a line for each step, and checks the nodes."""

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
    """Reject overrides of keys that the launcher sets.

    Raises:
        TrainingError: An override sets such a key; the message names it.
    """
    for override in overrides:
        if _key(override) in OWN_KEYS:
            raise TrainingError(
                f"{override} is not possible, because the launcher sets {_key(override)} from --run-dir. Remove the "
                "override."
            )


def refuse_another_run(known: Mapping[str, Any], asked: Mapping[str, Any], directory: Path) -> None:
    """Reject a call whose config differs from that of the run in the directory.

    Args:
        known: The request of the run in the directory.
        asked: The request of this call.
        directory: The run directory, for the message.

    Raises:
        TrainingError: The requests differ; the message lists the differences.
    """

    def binding(request: Mapping[str, Any]) -> list[str]:
        named = [renamed(word) for word in request.get("overrides", ()) if not _key(word).startswith(FREE_KEYS)]
        return [f"--config-name={request.get('config_name')}", *named]

    before, now = binding(known), binding(asked)
    if before != now:
        changed = [f"- {word}" for word in before if word not in now]
        changed += [f"+ {word}" for word in now if word not in before]
        raise TrainingError(
            f"--run-dir={directory} has a run that was started with other arguments:\n"
            + "\n".join(changed or ["the same arguments in another order"])
            + "\nUse another --run-dir, or the arguments in launch.json of the run."
        )


def cluster_overrides(config: DictConfig, environment: Mapping[str, str]) -> list[str]:
    """Overrides that make a config join the cluster of ``RAY_ADDRESS`` instead of starting a new one.

    Args:
        config: A whole verl config.
        environment: Environment of this process.

    Returns:
        Hydra overrides; empty if the variable is not set.
    """
    address = environment.get("RAY_ADDRESS")
    if not address:
        return []
    given = OmegaConf.select(config, "ray_kwargs.ray_init") or OmegaConf.create()
    # Unresolved, because this process has not loaded verl's plugins, which register resolvers.
    as_written = OmegaConf.to_container(given, resolve=False)
    assert isinstance(as_written, dict)
    dropped = [key for key in _OF_A_NEW_CLUSTER if as_written.get(key) is not None]
    return [f"++ray_kwargs.ray_init.address='{address}'", *(f"ray_kwargs.ray_init.{key}=null" for key in dropped)]


def require_cluster(config: DictConfig) -> None:
    """Reject a config with which each process would start its own Ray cluster.

    Raises:
        TrainingError: The config names no cluster; the message states what to set.
    """
    key = "ray_kwargs.ray_init.address"
    address = OmegaConf.select(config, key)
    if address in (None, "", "local"):
        raise TrainingError(
            f"{key}={address!r} and RAY_ADDRESS is not set, so there is no Ray cluster to train on. Set RAY_ADDRESS; "
            "on a node of a running cluster, set RAY_ADDRESS=auto. On a single machine, start a cluster with "
            "`ray start --head`."
        )


def plan(config: DictConfig, config_name: str, overrides: Sequence[str]) -> Training:
    """Build the training of a config, with the launcher's settings for keys that the config does not set.

    Args:
        config: A whole verl config.
        config_name: Name of the config.
        overrides: Overrides of the config.

    Raises:
        TrainingError: The config keeps too few checkpoints to resume from, or verl never completes them.
    """
    trainer = config.trainer
    for key in ("max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep"):
        if trainer.get(key) == 1:
            raise TrainingError(
                f"trainer.{key}=1 is not sufficient to resume without losing the metrics of a step, because verl saves "
                f"a step before it logs it; set trainer.{key}=2 or more"
            )
    if trainer.get("remove_previous_ckpt_in_save"):
        raise TrainingError(
            "trainer.remove_previous_ckpt_in_save=True keeps one checkpoint, which is not sufficient to resume without "
            "losing the metrics of a step; remove it, and set trainer.max_actor_ckpt_to_keep=2 or more"
        )
    key = "actor_rollout_ref.actor.checkpoint.async_save"
    if OmegaConf.select(config, key):
        # Nothing in verl 0.9.1 calls Megatron's ``maybe_finalize_async_calls``, which writes manifest and tracker.
        raise TrainingError(
            f"{key}=True does not work with the launcher, because verl does not complete such checkpoints, so that the "
            f"run could not resume; set {key}=False"
        )
    own = []
    saves = int(trainer.save_freq) > 0
    if not saves and trainer.get("max_actor_ckpt_to_keep") is None:
        # The user did not request checkpoints, so the run keeps only as many as it needs to resume.
        own += ["trainer.max_actor_ckpt_to_keep=2", "trainer.max_critic_ckpt_to_keep=2"]
    loggers = list(trainer.logger) if isinstance(trainer.logger, ListConfig) else [trainer.logger]
    if "file" not in loggers:
        loggers.append("file")
    own.append(f"trainer.logger=[{','.join(loggers)}]")
    # Without the overrides that the launcher replaces.
    kept = [word for word in overrides if _key(word) not in ("trainer.logger", "trainer.save_freq")]
    steps = trainer.get("total_training_steps")
    return Training(
        config_name=config_name,
        overrides=(*kept, *own),
        steps=None if steps is None else int(steps),
        save_every=int(trainer.save_freq) if saves else SAVE_EVERY,
        first_step=0 if trainer.get("val_before_train", True) else 1,
    )
