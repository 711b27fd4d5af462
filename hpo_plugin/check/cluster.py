"""Connects to the Ray cluster that a run would use, and checks each of its nodes."""

from __future__ import annotations

import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpo_plugin.check import probe
from hpo_plugin.check.report import Finding
from hpo_plugin.check.signals import signal_handlers_kept
from hpo_plugin.console import listed
from hpo_plugin.cpu.checks import CPUS_PER_RANK

#: Time limit for a connection to the head of a cluster, in seconds. Ray itself tries for a minute or more.
CONNECT_TIMEOUT = 5.0
#: TransferQueue's actor (transfer_queue/interface.py, ``init``). Its name and namespace are fixed. A trainer uses an
#: existing actor of this name.
QUEUE_ACTOR = {"name": "TransferQueueController", "namespace": "transfer_queue"}
#: Parts of a message of Ray that are different on each node: ids, addresses and process numbers.
_OF_ONE_NODE = r"[0-9a-f]{8,}|\d+(?:\.\d+){3}(?::\d+)?|\bpid=\d+"
#: Ray's message if its raylet did not start within 15 seconds, on a busy machine or shortly after booting.
SLOW_START = "timed out during startup"


class Cluster:
    """A Ray cluster, or the reason why there is no connection."""

    def __init__(self, failure: Finding | None = None) -> None:
        """Create a cluster.

        Args:
            failure: Why there is no connection; None if there is one.
        """
        self.failure = failure
        self._answers: dict[str, Any] = {}
        self._nodes: dict[str, dict[str, Any]] = {}
        self._begin = 0.0

    @classmethod
    @contextmanager
    def join(cls, config: DictConfig | None) -> Iterator[Cluster]:
        """Connect like ``verl.trainer.main_ppo``: ``ray_kwargs.ray_init``, ``RAY_ADDRESS``, or a new local cluster.

        Args:
            config: A whole verl config; None for Ray's own defaults.
        """
        # verl sets this before it imports Ray, and Ray reads it then.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        try:
            import ray
        except ImportError as error:
            yield cls(Finding("ray", f"cannot be imported: {error}", False, "pip install 'ray[default]'"))
            return
        if ray.is_initialized():
            yield cls()
            return
        failure = None
        try:
            arguments = ray_arguments(config)
            refuse_unreachable(arguments.get("address") or os.environ.get("RAY_ADDRESS"))
            _init_ray(arguments)
        except Exception as error:
            # verl would fail with the same exception: ConnectionError, ValueError or RuntimeError.
            reason = _reason(error)
            remedy = "start Ray (`ray start --head`), or correct RAY_ADDRESS and ray_kwargs.ray_init of the config"
            if SLOW_START in reason:
                remedy = "other processes keep this machine busy; stop them, or try again later"
            failure = Finding("ray", f"cannot be reached or started: {reason}", False, remedy)
        try:
            yield cls(failure)
        finally:
            if failure is None:
                ray.shutdown()

    def ask_every_node(self, files: Sequence[tuple[str, str]] = (), shared: Path | None = None) -> None:
        """Start the probe on each living node, in a new worker process.

        Args:
            files: See :func:`hpo_plugin.check.probe.probe`.
            shared: See :func:`hpo_plugin.check.probe.probe`.
        """
        if self.failure is not None:
            return
        import ray
        from ray import cloudpickle
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # By value, because a node may not have this package, or may have another version of it.
        cloudpickle.register_pickle_by_value(probe)
        try:
            # One call per worker process, so that the process is new. No CPU, so that a busy node answers.
            task = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(probe.probe)
            self._begin = time.monotonic()
            for node in ray.nodes():
                if node["Alive"]:
                    pinned = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
                    self._nodes[node["NodeID"]] = node
                    self._answers[node["NodeID"]] = task.options(scheduling_strategy=pinned).remote(
                        files, None if shared is None else str(shared)
                    )
        finally:
            cloudpickle.unregister_pickle_by_value(probe)

    def check_nodes(self, here: dict[str, Any], timeout: float) -> list[Finding]:
        """Wait for the results of the nodes and compare them with this process.

        Args:
            here: The result of :func:`hpo_plugin.check.probe.probe` in this process.
            timeout: Time limit for each node, in seconds from the start of its probe.
        """
        if self.failure is not None:
            return [self.failure]
        import ray

        remaining = max(0.0, timeout - (time.monotonic() - self._begin))
        ray.wait(list(self._answers.values()), num_returns=len(self._answers), timeout=remaining)
        # Nodes with the same finding share a line, because a cluster can have hundreds of nodes.
        same: dict[tuple[str, bool, str], list[tuple[str, Finding]]] = {}
        for node_id, answer in self._answers.items():
            node = self._nodes[node_id]
            host, label, differs = node["NodeManagerHostname"], f"node {node['NodeManagerAddress']}", ""
            try:
                there = ray.get(answer, timeout=0)
            except ray.exceptions.GetTimeoutError:
                found = f"{host}: no answer within {timeout:g} s"
                findings = [Finding(label, found, False, "check the node, or increase --timeout (quickstart: --stall)")]
            except ray.exceptions.RayError as error:
                found, differs = f"{host}: {' '.join(str(error).split())[-400:]}", _OF_ONE_NODE
                findings = [Finding(label, found, False, "see the Ray logs of the node")]
            else:
                host = there["host"]
                findings = compare_node(label, here, there)
            for finding in findings:
                said = finding.found.removeprefix(f"{host}: ")
                key = re.sub(differs, "#", said) if differs else said, finding.ok, finding.remedy
                same.setdefault(key, []).append((host, finding))
        merged = [_of_nodes(entries) for entries in same.values()]
        return merged or [Finding("ray", "the cluster has no living node", False, "start Ray: `ray start --head`")]

    def check_devices(self, config: DictConfig) -> list[Finding]:
        """Compare the accelerators that the config requests with those of the cluster."""
        if self.failure is not None:
            return []
        import ray

        pools = _pools(config)
        nodes, per_node = pools["trainer"]
        have = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        counts = _counted(sorted((_accelerators(resources) for resources in have), reverse=True))
        asked = " and ".join(f"{key}.nnodes={n} x {key}.n_gpus_per_node={gpus}" for key, (n, gpus) in pools.items())
        found = f"{asked} requested; the nodes of the cluster have {counts or 'none'}"
        if _placed(have, pools) < len(_groups(pools)):
            if dead := self.dead_nodes():
                found += f"; these nodes have died: {listed(dead.values())}"
            keys = " and of ".join(pools)
            remedy = f"correct nnodes and n_gpus_per_node of {keys}, or add nodes to the cluster"
            return [Finding("accelerators", found, False, remedy)]
        if not _holds(have, nodes, per_node, cpus=CPUS_PER_RANK):
            cpus = _counted(int(resources.get("CPU", 0)) for resources in have)
            found = f"each node needs {per_node * CPUS_PER_RANK} logical CPUs; the nodes have {cpus}"
            remedy = "start Ray with a larger `ray start --num-cpus`; with too few CPUs, verl waits forever"
            return [Finding("accelerators", found, False, remedy)]
        return [Finding("accelerators", found)]

    def lacks(self, config: DictConfig) -> str | None:
        """What a run has to wait for: nodes, free accelerators, or the end of another run.

        Returns:
            A description in one line; None if a run can start.
        """
        import ray

        pools = _pools(config)
        groups = _groups(pools)
        have = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if (placed := _placed(have, pools)) < len(groups):
            asked = " and ".join(
                f"{nodes} node{'' if nodes == 1 else 's'} with {per_node} accelerators each"
                + (f" ({key})" if len(pools) > 1 else "")
                for key, (nodes, per_node) in pools.items()
            )
            return f"{asked}; the cluster has {placed} of these"
        free, total = _accelerators(ray.available_resources()), sum(map(_accelerators, have))
        if free < sum(groups):
            return f"{sum(groups)} free accelerators; {free} of the cluster's {total} are free"
        if QUEUE_ACTOR in ray.util.list_named_actors(all_namespaces=True):
            return (
                f"the end of another run of verl: its actor {QUEUE_ACTOR['name']} is on the cluster, and both runs "
                "would use it"
            )
        return None

    def living_nodes(self) -> set[str]:
        """Ids of the nodes that are alive."""
        import ray

        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def dead_nodes(self) -> dict[str, str]:
        """Ids and addresses of the dead nodes of the cluster."""
        import ray

        return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if not node["Alive"]}


def _of_nodes(same: Sequence[tuple[str, Finding]]) -> Finding:
    """One finding for the nodes with the same finding, from their hosts and their findings."""
    host, finding = same[0]
    if len(same) == 1:
        return finding
    said = finding.found.removeprefix(f"{host}: ")
    return Finding(f"{len(same)} nodes", f"{listed(host for host, _ in same)}: {said}", finding.ok, finding.remedy)


def _counted(values: Iterable[int]) -> str:
    """Equal numbers with how often they occur: "8, 4, 4" is "8, 2 x 4"."""
    return ", ".join(f"{count} x {value}" if count > 1 else str(value) for value, count in Counter(values).items())


def _pools(config: DictConfig) -> dict[str, tuple[int, int]]:
    """Key of each resource pool of verl -> number of nodes, and of accelerators of each.

    Source: ``_init_resource_pool_mgr`` in verl/trainer/ppo/v1/trainer_base.py, and the replicas of
    ``LLMServerManager`` (verl/workers/rollout/llm_server.py), for which the separate and asynchronous trainers use
    nodes of their own.
    """
    keys = ["trainer"]
    if OmegaConf.select(config, "rollout.nnodes"):
        keys.append("rollout")
    elif OmegaConf.select(config, "trainer.v1.trainer_mode") == "separate_async" and OmegaConf.select(
        config, "trainer.use_v1", default=True
    ):
        keys.append("actor_rollout_ref.rollout")
    if OmegaConf.select(config, "reward.reward_model.enable_resource_pool"):
        keys.append("reward.reward_model")
    if OmegaConf.select(config, "distillation.enabled"):
        keys.append("distillation")
    return {
        key: (int(OmegaConf.select(config, f"{key}.nnodes")), int(OmegaConf.select(config, f"{key}.n_gpus_per_node")))
        for key in keys
    }


def _groups(pools: Mapping[str, tuple[int, int]]) -> list[int]:
    """Accelerators of each placement group, the largest first: verl asks for one group per node of a pool."""
    return sorted((per_node for nodes, per_node in pools.values() for _ in range(nodes) if per_node), reverse=True)


def _placed(nodes: Iterable[Mapping[str, float]], pools: Mapping[str, tuple[int, int]]) -> int:
    """How many placement groups of all pools fit on the nodes at the same time."""
    free, placed = [_accelerators(resources) for resources in nodes], 0
    for group in _groups(pools):
        # The node with the fewest free accelerators that are sufficient.
        node = min((i for i, count in enumerate(free) if count >= group), key=free.__getitem__, default=None)
        if node is not None:
            free[node] -= group
            placed += 1
    return placed


def _accelerators(resources: Mapping[str, float]) -> int:
    return int(resources.get("GPU", 0) or resources.get("NPU", 0))


def _holds(nodes: Iterable[Mapping[str, float]], asked: int, per_node: int, *, cpus: int) -> bool:
    """Whether the nodes have room for ``asked`` placement groups of ``per_node`` ranks with ``cpus`` CPUs each."""
    if not per_node:
        return True
    room = 0
    for resources in nodes:
        held = _accelerators(resources) // per_node
        room += min(held, int(resources.get("CPU", 0)) // (cpus * per_node))
    return room >= asked


def _reason(error: Exception) -> str:
    """The error in one line, with the last line of its cause if Ray attaches a traceback, as for a rejected token."""
    said = " ".join(str(error).split())
    cause = str(error.__cause__ or "").strip().splitlines()
    return f"{said}: {cause[-1].strip()[:300]}" if cause else said


def _init_ray(arguments: dict[str, Any]) -> None:
    """Call ``ray.init``, and once more if the machine was too slow to start a node."""
    import ray

    # A cluster that Ray starts here sends usage statistics by default.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for last in (False, True):
        try:
            # Ray replaces the handler of SIGTERM.
            with signal_handlers_kept():
                ray.init(**arguments)
            return
        except Exception as error:
            if last or SLOW_START not in str(error):
                raise
            ray.shutdown()


def ray_arguments(config: DictConfig | None) -> dict[str, Any]:
    """Arguments of ``ray.init``: those of the config, with Ray's output disabled."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if config is None:
        # Without a config and without a cluster: a minimal local cluster.
        local = not os.environ.get("RAY_ADDRESS") and not _has_current_cluster()
        return quiet | ({"num_cpus": 1, "include_dashboard": False} if local else {})
    # verl's plugins register the resolvers that configs use; main_ppo also imports verl first.
    import verl  # noqa: F401

    given = OmegaConf.select(config, "ray_kwargs.ray_init")
    arguments = OmegaConf.to_container(given, resolve=True) if given is not None else {}
    assert isinstance(arguments, dict)
    return {str(key): value for key, value in arguments.items()} | quiet


def _has_current_cluster() -> bool:
    # The same look-up as in ray.init() without an address.
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return canonicalize_bootstrap_address("auto") is not None
    except Exception:
        return False


def refuse_unreachable(address: str | None) -> None:
    """Raise if the head of a cluster does not answer within :data:`CONNECT_TIMEOUT`.

    Args:
        address: ``host:port`` or ``ray://host:port``. For ``auto``, ``local`` and None, the function does nothing.

    Raises:
        ConnectionError: There is no answer at the address.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT).close()
    except OSError as error:
        raise ConnectionError(f"no answer at {address}: {error}") from error


def compare_node(label: str, here: dict[str, Any], there: dict[str, Any]) -> list[Finding]:
    """Findings about one node.

    Args:
        label: Name of the findings.
        here: The result of the probe in this process.
        there: The result of the probe on the node.
    """
    findings = [Finding(label, f"{there['host']}: {what}", False, remedy) for what, remedy in there["problems"]]
    pairs = {"python": (there["python"], here["python"])} | {
        name: (there["versions"][name], here["versions"][name]) for name in here["versions"]
    }
    for name, (found, expected) in pairs.items():
        if found != expected:
            what = f"{there['host']}: {name} is {found or 'not installed'}, but {expected or 'not installed'} locally"
            findings.append(Finding(label, what, False, "install the same versions on every node"))
    if there["code"] != here["code"] and pairs["hpo-plugin"][0] == pairs["hpo-plugin"][1]:
        what = f"{there['host']}: the code differs from the local code ({there['code']}, locally {here['code']})"
        findings.append(Finding(label, what, False, "install the same source on every node"))
    if not findings:
        findings.append(Finding(label, f"{there['host']}: registered, same versions"))
    return findings
