"""Reports of bugs of verl (``issues/``), each with a script that shows one, and whether a verl still shows it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Report", "checkout", "environment", "missing", "read", "reports", "run", "shown"]

FOLDER = Path(__file__).with_suffix("")
#: A file that git checkouts of verl have, and neither its wheel nor its source distribution.
IN_A_CHECKOUT = "examples/tutorial/slurm/ray_on_slurm.slurm"
CHECKOUT, MEGATRON = "checkout", "megatron-core"
TIMEOUT = 240


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        name: The file's name without its suffix.
        title: ``[module] What goes wrong``.
        language: Of the script, ``python`` or ``bash``.
        script: What shows the bug.
        output: What the script prints on stdout where verl has the bug, without the last newline.
        needs: What the script needs beside verl's wheel, ``checkout`` or ``megatron-core``, else None.
    """

    name: str
    title: str
    language: str
    script: str
    output: str
    needs: str | None


def reports() -> list[Path]:
    """The reports, in order."""
    return sorted(FOLDER.glob("*.md"))


def read(path: Path) -> Report:
    """Read a report.

    Args:
        path: a file of :func:`reports`.

    Returns:
        Its parts.

    Raises:
        ValueError: if the title, the script, the output, or the line of versions or of upstream's reports is missing,
            or it needs something unknown.
    """
    text = path.read_text(encoding="utf-8")

    def found(what: str, pattern: str) -> re.Match[str]:
        match = re.search(pattern, text, re.MULTILINE | re.DOTALL)
        if match is None:
            raise ValueError(f"{path.name} has no {what}")
        return match

    title = found("title '# [module] ...'", r"\A# (\[[a-z_, ]+\] [^\n]+)\n")
    script = found("script, a block ```python or ```bash", r"^```(python|bash)\n(.*?)^```$")
    output = found("output, a block ```text", r"^```text\n(.*?)\n```$")
    found("line '- Seen with: ...'", r"^- Seen with: \S")
    found("line '- Known upstream: ...'", r"^- Known upstream: \S")
    needs = re.search(r"^<!-- needs: (\S+) -->\s*\Z", text, re.MULTILINE)
    if needs is not None and needs[1] not in (CHECKOUT, MEGATRON):
        raise ValueError(f"{path.name} needs {needs[1]}, which is neither {CHECKOUT} nor {MEGATRON}")
    return Report(path.stem, title[1], script[1], script[2], output[1], needs[1] if needs else None)


def checkout(tree: Path | None) -> Path:
    """Where the examples of verl are looked for.

    Args:
        tree: a source tree of verl; None: that of ``VERL_CHECKOUT``, or the current directory.

    Returns:
        A directory, which need not be a checkout.
    """
    return tree if tree is not None else Path(os.environ.get("VERL_CHECKOUT", ""))


def missing(report: Report, *, tree: Path | None) -> str | None:
    """What a script needs and does not find.

    Args:
        report: whose script is to be run.
        tree: a source tree of verl; None: the installed verl, and a checkout named by ``VERL_CHECKOUT``.

    Returns:
        A sentence; None if nothing is missing.
    """
    if report.needs == CHECKOUT and not (checkout(tree) / IN_A_CHECKOUT).is_file():
        return "needs a git checkout of verl, in VERL_CHECKOUT"
    if report.needs == MEGATRON:
        try:
            spec = importlib.util.find_spec("megatron.core")
        except ModuleNotFoundError:
            spec = None
        if spec is None:
            return "needs megatron-core and mbridge"
    return None


def environment(tree: Path | None) -> dict[str, str]:
    """The environment a script runs in: verl alone, without plugins and without a network.

    Args:
        tree: a source tree of verl that replaces the installed verl; nothing is written into it.

    Returns:
        All variables.
    """
    variables = os.environ | {"VERL_USE_EXTERNAL_PLUGINS": "none", "HF_HUB_OFFLINE": "1"}
    if tree is not None:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tree.resolve()), os.environ.get("PYTHONPATH")]))
        variables["PYTHONDONTWRITEBYTECODE"] = "1"
    return variables


def run(report: Report, python: str, environment: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the script of a report.

    Args:
        report: whose script.
        python: the interpreter; in a bash script, ``python`` is the one in its directory.
        environment: all variables, see :func:`environment`.
        cwd: the working directory.

    Returns:
        What the script printed, and its status.
    """
    variables = dict(environment)
    variables["PATH"] = os.pathsep.join(filter(None, [str(Path(python).parent), environment.get("PATH")]))
    interpreter = python if report.language == "python" else "bash"
    command = [interpreter, "-c", report.script]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=TIMEOUT)


def shown(report: Report, *, tree: Path | None) -> bool | None:
    """Whether verl has the bug of a report.

    Args:
        report: whose script is run, in a directory of its own, or in the checkout that it needs.
        tree: a source tree of verl to use instead of the installed verl.

    Returns:
        True: the script prints what the report says. False: it prints something else. None: what it needs is missing.
    """
    if missing(report, tree=tree) is not None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        cwd = checkout(tree) if report.needs == CHECKOUT else Path(directory)
        return run(report, sys.executable, environment(tree), cwd).stdout == f"{report.output}\n"
