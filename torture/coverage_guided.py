"""Coverage-guided search for hostile text, with Atheris (libFuzzer for Python).

libFuzzer mutates the texts that reach new branches of ``hpo_plugin.tasks``. The oracles are those of
:mod:`torture.text`. A process fuzzes one target, because libFuzzer ends its process:

    python -m torture.coverage_guided countdown --runs 10000 FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torture.probe import Probe, Result, seeded

#: Largest input, in bytes.
MAX_BYTES = 8192
#: A target with so many failures is stopped.
MAX_FAILURES = 20

#: Examines a text, and adds to a result.
Examine = Callable[[str, Result], None]


def targets() -> dict[str, tuple[list[str], list[str], Examine]]:
    """The texts to start from, the pieces to insert, and the function that examines a text, by target."""
    # Not at the top of this file: it imports the code that :func:`fuzz` instruments.
    text: Any = importlib.import_module("torture.text")

    def untimed(call: Callable[[], Any], _: str) -> Any:
        # The instrumentation of Atheris slows the code down.
        return call()

    def countdown(given: str, result: Result) -> None:
        for layout, whole in (("terse", given), ("public", given), ("public", f"<answer>{given}</answer>")):
            text.examine_countdown(text.CountdownInput(whole, *text.TRUTH, layout), result, untimed)

    def tinyzero(given: str, result: Result) -> None:
        whole = f"<answer>{given}</answer>"
        text.examine_tinyzero(text.CountdownInput(whole, *text.solved(given), "public"), result, untimed)

    def telelogs(given: str, result: Result) -> None:
        for whole in (given, rf"\boxed{{{given}}}"):
            text.examine_telelogs(text.TeleLogsInput(whole, "C3", "C3"), result, untimed)

    def prompt(given: str, result: Result) -> None:
        text.examine_prompt(given, result, untimed)

    return {
        "countdown": ([text.RIGHT, *text.corpus("countdown")], text.COUNTDOWN_PIECES, countdown),
        "tinyzero": ([text.RIGHT, *text.corpus("tinyzero")], text.PYTHON_PIECES, tinyzero),
        "telelogs": ([r"\boxed{C3}", *text.corpus("telelogs")], text.TELELOGS_PIECES, telelogs),
        "prompt": ([*text.prompts(), *text.corpus("prompt")], text.PROMPT_PIECES, prompt),
    }


def dictionary(pieces: list[str]) -> str:
    """Pieces in libFuzzer's format."""
    words = {piece.encode("utf-8", "ignore")[:64] for piece in pieces}
    lines = ["".join(f"\\x{byte:02x}" for byte in word) for word in sorted(words) if word]
    return "".join(f'"{line}"\n' for line in lines)


def fuzz(name: str, runs: int, seed: int, folder: Path) -> None:
    """Fuzz a target, write ``result.json``, and end this process.

    Args:
        name: Of the target.
        runs: Number of inputs of libFuzzer.
        seed: Of libFuzzer.
        folder: Gets the texts and the result.
    """
    import atheris

    # Without its hook for regular expressions, whose patterns lack the arguments ``pos`` and ``endpos``.
    with atheris.instrument_imports(include=["hpo_plugin.tasks"], enable_loader_override=False):
        importlib.import_module("torture.text")
    texts, pieces, examine = targets()[name]
    (folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number}").write_bytes(text.encode("utf-8", "ignore"))
    (folder / "pieces").write_text(dictionary(pieces), encoding="ascii")
    result, calls = Result(), 0

    def one(data: bytes) -> None:
        nonlocal calls
        calls += 1
        examine(data.decode("utf-8", "replace"), result)
        if calls == runs or len(result.failures) >= MAX_FAILURES:
            (folder / "result.json").write_text(json.dumps(dataclasses.asdict(result)))
            os._exit(0)

    # -rss_limit_mb=0: no limit of memory.
    options = [f"-seed={seed + 1}", f"-max_len={MAX_BYTES}", "-rss_limit_mb=0", f"-dict={folder / 'pieces'}"]
    atheris.Setup([sys.argv[0], *options, str(folder / "texts")], one)
    atheris.Fuzz()


def search(name: str, runs: int, work: Path, seed: int) -> Result:
    """Fuzz a target in a process of its own; the result also has the number of branches that were reached."""
    command = [sys.executable, "-m", "torture.coverage_guided", name, f"--runs={runs}", f"--seed={seed}", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    answer, reached = work / "result.json", re.findall(r"\bcov: (\d+)", done.stderr)
    if not answer.exists():
        return Result(failures=[f"exit status {done.returncode}\n{done.stderr[-3000:]}"])
    result = Result(**json.loads(answer.read_bytes()))
    if not reached:
        result.failures.append("no branch was counted")
    else:
        result.measure("branches reached", int(reached[-1]))
    return result


def probe(name: str, runs: int, title: str, expected: str) -> Probe:
    """The probe of a target."""
    return Probe(f"coverage-{name}", "text", title, expected, seeded(1, partial(search, name, runs)))


PROBES: tuple[Probe, ...] = (
    probe(
        "countdown", 1_000_000, "Countdown reward, coverage-guided", "reward 1 only if the oracle agrees; no exception"
    ),
    probe(
        "tinyzero",
        1_000_000,
        "Countdown reward with `mode=tinyzero`, coverage-guided",
        "the decision of the public scorer; no exception",
    ),
    probe(
        "telelogs", 1_000_000, "TeleLogs reward, coverage-guided", "reward 1 only if the oracle agrees; no exception"
    ),
    probe(
        "prompt",
        200_000,
        "`parse_prompt` of TeleLogs, coverage-guided",
        "the same text when rendered, or `PromptError` with the line",
    ),
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    fuzz(given.target, given.runs, given.seed, given.folder)
