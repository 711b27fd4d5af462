"""Two hosts on one machine: namespaces joined by a bridge, or, where those cannot be made, two loopback addresses.

A namespaced host has a network, a host name and mounts of its own, so that addresses, names and ports are as on two
machines. On loopback, a host is a set of processes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

#: Its own for each run of the tests: `ray start` looks for another head at its address among all processes.
NETWORK = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
#: Where this interpreter's scripts are: ``ray`` and ``hpo-plugin``.
BIN = Path(sys.executable).parent
#: Ray 2.60 asks for a token where one lies in the home directory: one of our own makes the tests the same everywhere.
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "VERL_PLATFORM": "cpu",
}
#: Logical ones: three for a training rank, and some for verl's other actors.
RAY_RESOURCES = ("--num-cpus=8", "--num-gpus=1", "--object-store-memory=200000000")

_SET_UP = """
hostname "$1"
mount --bind "$2" /etc/hosts
mount --bind "$3" /tmp/ray
touch "$4"
exec sleep infinity
"""


def run_as_root(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Host:
    """One of the hosts; this one on loopback."""

    namespaced = False

    def __init__(self, name: str, address: str, work: Path) -> None:
        self.name = name
        self.address = address
        #: For Ray: its sockets' paths must be short.
        self.work = work
        self._processes: list[subprocess.Popen[bytes]] = []

    def enter(self) -> list[str]:
        """What precedes a command to run it on this host."""
        return []

    def start(self, *command: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on this host; its output goes to the end of a file."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self.enter(), *command],
                env=os.environ | RAY_ENVIRONMENT | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def start_ray(self, head: Host | None = None, *resources: str, **environment: str) -> subprocess.Popen[bytes]:
        """``ray start --block``; as the head where none is given."""
        where = [f"--address={head.address}:6379"] if head else ["--head", "--port=6379", "--include-dashboard=false"]
        return self.start(
            *[str(BIN / "ray"), "start", "--block", f"--node-ip-address={self.address}", f"--temp-dir={self.work}"],
            *[*where, *(resources or RAY_RESOURCES)],
            log=self.work.with_suffix(".log"),
            **environment,
        )

    def processes(self) -> list[psutil.Process]:
        """What runs on this host: the sessions of what was started, and its descendants in sessions of their own."""
        sessions = {process.pid for process in self._processes}
        found = {process for process in psutil.process_iter() if _session(process.pid) in sessions}
        for process in tuple(found):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.update(process.children(recursive=True))
        return [process for process in found if _alive(process)]

    def kill(self) -> None:
        """Everything on this host stops at once."""
        while found := self.processes():
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
        self.forget()

    def forget(self) -> None:
        """Wait for the processes that have ended."""
        for process in self._processes:
            process.wait()
        self._processes.clear()

    def boot(self) -> None:
        """Make it ready to run commands."""

    def remove(self) -> None:
        """Leave nothing behind."""
        self.kill()
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.with_suffix(".log").unlink(missing_ok=True)


class NamespacedHost(Host):
    """A host with namespaces of its own."""

    namespaced = True

    def __init__(self, name: str, address: str, work: Path, bridge: str, hosts_file: Path) -> None:
        super().__init__(name, address, work)
        self._bridge = bridge
        self._hosts_file = hosts_file
        self._cable = f"{bridge}-{address.rpartition('.')[2]}"
        # Keeps the namespaces while nothing else is in them.
        self._holder: subprocess.Popen[bytes] | None = None

    def enter(self) -> list[str]:
        assert self._holder is not None, f"{self.name} is not booted"
        return ["nsenter", f"--target={self._holder.pid}", "--net", "--uts", "--mount", "--"]

    def boot(self) -> None:
        booted = self.work.with_suffix(".booted")
        # What Ray keeps under its default directory is each host's own.
        for directory in (self.work, Path("/tmp/ray")):
            directory.mkdir(parents=True, exist_ok=True)
        self._holder = subprocess.Popen(
            [
                *["unshare", "--net", "--uts", "--mount"],
                *["sh", "-ec", _SET_UP, "sh", self.name, str(self._hosts_file), str(self.work), str(booted)],
            ]
        )
        wait_for(booted.exists, f"the namespaces of {self.name}", 10)
        booted.unlink()
        peer = ["peer", "name", "eth0", "netns", str(self._holder.pid)]
        run_as_root("ip", "link", "add", self._cable, "type", "veth", *peer)
        run_as_root("ip", "link", "set", self._cable, "master", self._bridge, "up")
        for command in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            run_as_root(*self.enter(), "ip", *command.split())

    def processes(self) -> list[psutil.Process]:
        if self._holder is None:
            return []
        mine, found = os.readlink(f"/proc/{self._holder.pid}/ns/net"), []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                inside = os.readlink(f"/proc/{process.pid}/ns/net") == mine
                if inside and process.pid != self._holder.pid and _alive(process):
                    found.append(process)
        return found

    def kill(self) -> None:
        super().kill()
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait()
            self._holder = None
            # It vanishes with the host's namespace, a moment later.
            subprocess.run(["ip", "link", "delete", self._cable], capture_output=True, check=False)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """A head and a worker, booted, with nothing on them."""
    root = Path(tempfile.mkdtemp(prefix="hpo"))
    bridge = f"hpo{os.getpid()}"
    names = {"hpo-1": f"{NETWORK}.1", "hpo-2": f"{NETWORK}.2"}
    hosts: list[Host] = []
    made = _make_bridge(bridge)
    try:
        if made:
            file = root / "hosts"
            file.write_text("".join(f"{at} {name}\n" for name, at in {"localhost": "127.0.0.1", **names}.items()))
            hosts += [NamespacedHost(name, at, root / name, bridge, file) for name, at in names.items()]
        else:
            hosts += [Host(name, f"127.0.0.{n}", root / name) for n, name in enumerate(names, start=1)]
        for host in hosts:
            host.boot()
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.remove()
        if made:
            run_as_root("ip", "link", "delete", bridge)
        shutil.rmtree(root, ignore_errors=True)


def _make_bridge(name: str) -> bool:
    """Make the bridge; False where namespaces cannot be made. HPO_TEST_LOOPBACK=1 asks for loopback."""
    if os.environ.get("HPO_TEST_LOOPBACK") == "1":
        return False
    try:
        run_as_root("unshare", "--net", "--uts", "--mount", "true")
        run_as_root("ip", "link", "add", name, "type", "bridge")
        run_as_root("ip", "link", "set", name, "up")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, what: str, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)


def launch_arguments(inputs: Path, run_dir: Path, steps: int) -> list[str]:
    """Arguments of ``hpo-plugin launch``: a short training over two nodes, with a checkpoint after each second step."""
    return [
        *["--config-name=countdown_cpu", f"--run-dir={run_dir}", "--wait-for-nodes=300"],
        f"actor_rollout_ref.model.path={inputs / 'model'}",
        f"data.train_files={inputs / 'data' / 'train.parquet'}",
        f"data.val_files={inputs / 'data' / 'test.parquet'}",
        f"reward.custom_reward_function.path={inputs / 'reward.py'}",
        *["data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=4"],
        *[f"trainer.total_training_steps={steps}", "trainer.save_freq=2", "trainer.test_freq=-1"],
        *["trainer.nnodes=2", "trainer.n_gpus_per_node=1"],
    ]
