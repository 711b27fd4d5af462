"""Ray brings the plugin to nodes that lack it: in a way in which verl finds it, and in one that the check refuses."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("verl")

from hosts import RAY_RESOURCES, two_hosts, wait_for

import hpo_plugin

PACKAGE = Path(hpo_plugin.__file__).parent


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """This environment without the plugin."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("hpo_plugin", "__editable__", "hydra_plugins")):
            (site / path.name).symlink_to(path)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def submit(bare, tmp_path_factory):
    """``ray job submit`` to a head with the bare environment; returns the exit status and what was printed."""
    logs = tmp_path_factory.mktemp("logs")
    with two_hosts() as (head, _):
        if not head.namespaced:
            pytest.skip("needs a host of namespaces, that is root on Linux: Ray's dashboard takes a fixed port")
        # As where the environment is activated.
        clean = {"PYTHONPATH": "", "VERL_PLATFORM": "", "PATH": f"{bare.parent}{os.pathsep}{os.environ['PATH']}"}
        ray = [str(bare), "-m", "ray.scripts.scripts"]
        address = [f"--address=http://{head.address}:8265"]
        head.start(
            *[*ray, "start", "--head", "--block", f"--node-ip-address={head.address}", "--port=6379"],
            *["--dashboard-host=0.0.0.0", *RAY_RESOURCES],
            log=logs / "ray.log",
            **clean,
        )

        def answers():
            return head.start(*ray, "job", "list", *address, log=logs / "list.log", **clean).wait() == 0

        wait_for(answers, "the head", 300)

        def submit(runtime_env, *command):
            log = logs / "job.log"
            log.unlink(missing_ok=True)
            words = [*ray, "job", "submit", *address, f"--runtime-env-json={json.dumps(runtime_env)}", "--", *command]
            return head.start(*words, log=log, **clean).wait(600), log.read_text()

        yield submit


@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_a_wheel_that_pip_installs_on_each_node_is_found_by_verl(submit, wheel_file):
    pip = {"packages": [str(wheel_file)], "pip_install_options": ["--no-deps"]}
    status, said = submit({"pip": pip}, "hpo-plugin", "check")
    assert "registered, same versions" in said
    assert status == 0, said


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_bare_package_is_not_found_by_verl_and_the_check_says_so(submit):
    """Ray's py_modules brings files without entry points."""
    status, said = submit({"py_modules": [str(PACKAGE)]}, "python", "-m", "hpo_plugin.cli", "check")
    assert "declare no entry point hpo in the group verl.plugins" in said
    assert status != 0
