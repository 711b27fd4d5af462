"""The command that runs probes: results, failures, hangs, and a second call after an interruption."""

import json
import sys

import pytest

from torture import __main__ as torture

PROBES = """
import os, time
from pathlib import Path
from torture.probe import Probe, Result

def good(folder: Path) -> Result:
    (folder / "a file of the case").touch()
    with open({calls!r}, "a") as calls:
        calls.write("good ")
    return Result(inputs=3, counts={{"accepted": 2}}, worst={{"slowest input (ms)": float(os.environ["SLOWEST"])}})

def wrong(folder: Path) -> Result:
    (folder / "evidence").touch()
    return Result(inputs=2, failures=["input 7: accepted"])

def raising(folder: Path) -> Result:
    raise ValueError("no such thing")

def killed(folder: Path) -> Result:
    print("last words", flush=True)
    os.kill(os.getpid(), 9)

def hanging(folder: Path) -> Result:
    time.sleep(60)

PROBES = (
    Probe("fine", "text", "two cases", "no exception", {{"one": good, "two": good}}),
    Probe("wrong", "text", "an outcome", "rejected", {{"one": wrong, "two": good}}),
    Probe("raising", "runs", "an exception", "none", {{"one": raising}}),
    Probe("killed", "runs", "a kill", "none", {{"one": killed}}),
    Probe("hanging", "runs", "a hang", "none", {{"one": hanging}}, limit=5.0),
)
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The name of a module with the probes above, for this process and its children."""
    (tmp_path / "fake_probes.py").write_text(PROBES.format(calls=str(tmp_path / "calls")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SLOWEST", "1.25")
    yield ("fake_probes",)
    sys.modules.pop("fake_probes", None)


def test_cases_run_once_and_their_results_are_added_up(modules, tmp_path, monkeypatch):
    work = tmp_path / "workspace"
    assert torture.run(["fine"], work, modules)
    (work / "fine" / "two.json").unlink()
    monkeypatch.setenv("SLOWEST", "7.5")
    assert torture.run(["fine"], work, modules)
    assert (tmp_path / "calls").read_text() == "good good good "
    found = torture.record(work, {}, modules)
    assert found.keys() == {"fine"}
    fine = found["fine"]
    assert (fine["inputs"], fine["failures"], fine["counts"]) == (6, [], {"accepted": 4})
    assert fine["worst"] == {"slowest input (ms)": 7.5}
    assert fine["cases"] == 2
    assert {"python", "verl"} <= fine["versions"].keys()
    page = torture.page("before\n<!-- table: text -->\nold\n<!-- end -->\nafter", found, modules)
    assert "old" not in page
    assert "| two cases | no exception | 6 | accepted: 4; slowest input (ms): 7.5 |" in page
    assert "| an outcome | rejected | not run | |" in page


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wrong", "input 7: accepted"),
        ("raising", "ValueError: no such thing"),
        ("killed", "last words"),
        ("hanging", "did not end within 5 s"),
    ],
)
def test_a_failure_is_shown_and_is_run_again(modules, tmp_path, capsys, name, said):
    assert not torture.run([name], tmp_path / "workspace", modules)
    assert said in capsys.readouterr().out
    assert torture.record(tmp_path / "workspace", {name: {}, "other": {}}, modules) == {"other": {}}
    assert not torture.run([name], tmp_path / "workspace", modules)
    assert said in capsys.readouterr().out


def test_the_folder_of_a_failed_case_is_kept(modules, tmp_path):
    for _ in range(2):
        assert not torture.run(["wrong", "killed"], tmp_path / "workspace", modules)
    assert (tmp_path / "workspace/wrong/one.failed/work/evidence").exists()
    assert "last words" in (tmp_path / "workspace/killed/one.failed/output.log").read_text()
    assert not (tmp_path / "workspace/wrong/two.failed").exists()


def test_the_command_knows_its_probes_and_rejects_others(capsys):
    assert torture.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in torture.probes())
    with pytest.raises(SystemExit):
        torture.main(["no-such-probe"])
    assert "'no-such-probe' is not one of" in capsys.readouterr().err


def test_names_of_probes_and_cases_are_unique_and_are_file_names():
    found = torture.probes()
    assert sum(len(sys.modules[module].PROBES) for module in torture.MODULES) == len(found)
    for probe in found.values():
        assert all(name.replace("-", "").replace("_", "").isalnum() for name in (probe.name, *probe.cases))


def test_the_page_has_the_committed_results_and_a_table_for_each_section():
    text = torture.PAGE.read_text()
    assert torture.page(text, json.loads(torture.RESULTS.read_text())) == text
    for probe in torture.probes().values():
        assert f"<!-- table: {probe.section} -->" in text
