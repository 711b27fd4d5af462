"""The trainer's processes: followed, reported when stalled, and ended, all of them."""

import json
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from hpo_plugin.runs import process
from hpo_plugin.runs.process import StalledError, Trainer, end_leftovers

#: Starts a child in a process group of its own, as Ray does, and writes both ids.
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], preexec_fn=os.setpgrp)
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start(tmp_path, code, *arguments):
    return Trainer([sys.executable, "-c", code, *arguments], {}, tmp_path / "log", tmp_path / "processes.json")


def ids(path):
    wait_for(lambda: path.exists() and len(path.read_text().split()) == 2)
    return [int(pid) for pid in path.read_text().split()]


def test_leaving_ends_the_processes_that_the_trainer_started_too(tmp_path):
    with start(tmp_path, FAMILY, str(tmp_path / "ids")):
        pids = ids(tmp_path / "ids")
        assert all(map(alive, pids))
    assert not any(map(alive, pids))
    assert not (tmp_path / "processes.json").exists()


def test_an_interrupt_while_the_record_is_written_ends_them_too(tmp_path, monkeypatch):
    pids = []

    def interrupted(*_):
        pids.extend(ids(tmp_path / "ids"))
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "atomic_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, FAMILY, str(tmp_path / "ids"))
    assert len(pids) == 2
    assert not any(map(alive, pids))


def test_processes_of_another_session_are_not_touched(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        with start(tmp_path, FAMILY, str(tmp_path / "ids")):
            ids(tmp_path / "ids")
        assert alive(other.pid)
    finally:
        other.kill()
        other.wait()


def test_output_goes_to_the_log_and_the_exit_status_is_returned(tmp_path):
    with start(tmp_path, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)") as trainer:
        assert trainer.follow(lambda: False, stall=60, interval=0.05) == 3
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]


def test_a_stalled_trainer_is_reported_and_not_waited_for(tmp_path):
    with (
        start(tmp_path, "import time; time.sleep(600)") as trainer,
        pytest.raises(StalledError, match="no progress for"),
    ):
        trainer.follow(lambda: False, stall=0.5, interval=0.05)
    assert not alive(trainer._process.pid)


def test_progress_puts_the_limit_off(tmp_path):
    looks = iter([True] * 12)
    with start(tmp_path, "import time; time.sleep(0.8)") as trainer:
        assert trainer.follow(lambda: next(looks, False), stall=0.5, interval=0.1) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's own")
def test_killing_the_caller_kills_the_trainer_and_the_next_call_ends_what_is_left(tmp_path):
    caller = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from hpo_plugin.runs.process import Trainer
        here = Path({str(tmp_path)!r})
        Trainer([sys.executable, "-c", {FAMILY!r}, str(here / "ids")], {{}}, here / "log", here / "processes.json")
        time.sleep(600)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", caller])
    leader, child = ids(tmp_path / "ids")
    process.kill()
    process.wait()
    wait_for(lambda: not alive(leader))
    # This child, unlike Ray's processes, does not end with its parent.
    assert alive(child)
    assert end_leftovers(tmp_path / "processes.json") == 1
    assert not alive(child)
    assert not (tmp_path / "processes.json").exists()


#: As FAMILY, with members that do not end when asked.
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FAMILY


def interruptible_caller(here, first=""):
    return textwrap.dedent(
        f"""
        import signal, sys, time
        from pathlib import Path
        from hpo_plugin.check.signals import interruptible
        from hpo_plugin.runs import process
        {first}
        process.GRACE = 1.0
        here = Path({str(here)!r})
        try:
            with interruptible():
                with process.Trainer(
                    [sys.executable, "-c", {STUBBORN!r}, str(here / "ids")], {{}}, here / "log", here / "processes.json"
                ):
                    time.sleep(600)
        except KeyboardInterrupt:
            sys.exit(7)
        """
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_does_not_break_off_the_ending(tmp_path, number):
    """As `timeout` sends them: one to the program, one to its group."""
    # A shell starts what runs in the background with SIGINT ignored, these tests too.
    heeded = f"signal.signal({int(number)}, signal.default_int_handler)"
    process = subprocess.Popen([sys.executable, "-c", interruptible_caller(tmp_path, heeded)])
    pids = ids(tmp_path / "ids")
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(timeout=30) == 7
    assert not any(map(alive, pids))
    assert not (tmp_path / "processes.json").exists()


def test_an_ignored_signal_stays_ignored(tmp_path):
    """So that nohup works."""
    code = interruptible_caller(tmp_path, "signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process = subprocess.Popen([sys.executable, "-c", code])
    pids = ids(tmp_path / "ids")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    assert all(map(alive, pids))
    process.terminate()
    assert process.wait(timeout=30) == 7
    assert not any(map(alive, pids))


def test_a_process_that_got_the_same_number_later_is_not_ended(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        record = tmp_path / "processes.json"
        record.write_text(json.dumps({"session": other.pid, "started": time.time() - 3600}))
        assert end_leftovers(record) == 0
        assert alive(other.pid)
        assert not record.exists()
    finally:
        other.kill()
        other.wait()


def test_a_record_that_a_crash_truncated_is_removed(tmp_path):
    record = tmp_path / "processes.json"
    record.write_text('{"session": 1')
    assert end_leftovers(record) == 0
    assert not record.exists()
    assert end_leftovers(record) == 0


def test_handlers_that_a_call_replaces_are_put_back():
    from hpo_plugin.check.signals import signal_handlers_kept

    def replace_and_fail():
        with signal_handlers_kept():
            signal.signal(signal.SIGTERM, lambda *_: None)
            raise ZeroDivisionError

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        replace_and_fail()
    assert signal.getsignal(signal.SIGTERM) is before
