"""Time and memory of ``hpo-plugin preview`` on a made-up dump: the table of ``docs/preview.md``.

    python scripts/preview_rows.py                  # 10 million rows
    python scripts/preview_rows.py --rows 1000000

The dump has prompts, rewards, steps and lengths in tokens. Responses would have to be read, too, and are larger.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import duckdb

#: Responses of a step and of a group; success becomes more frequent over the run.
STEP, GROUP = 4096, 8


def make(folder: Path, rows: int) -> dict[str, Path]:
    """Write the same rows as parquet and as JSON lines."""
    parquet, lines = folder / "rollouts.parquet", folder / "rollouts.jsonl"
    connection = duckdb.connect()
    connection.execute("SELECT setseed(0.5)")
    connection.execute(
        f"COPY (SELECT i // {STEP} AS step, 'prompt number ' || (i // {GROUP}) AS prompt, "
        f"CAST(random() < 0.02 + 0.9 * i / {rows} AS INT) AS reward, CAST(50 + 900 * random() AS INT) AS "
        f"response_length FROM range({rows}) t(i)) TO '{parquet}'"
    )
    connection.execute(f"COPY (SELECT * FROM '{parquet}') TO '{lines}' (FORMAT JSON)")
    return {"parquet": parquet, "JSON lines": lines}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    rows = parser.parse_args().rows
    print("| format | size | time | memory |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, file in make(folder, rows).items():
            command = [sys.executable, "-m", "hpo_plugin.cli", "preview", str(file), "--output", str(folder / name)]
            start = time.monotonic()
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(child.pid, 0)
            seconds = time.monotonic() - start
            if status:
                raise SystemExit(f"{' '.join(command)} failed")
            print(f"| {name} | {file.stat().st_size / 1e6:,.0f} MB | {seconds:.0f} s | {used.ru_maxrss / 1e6:.1f} GB |")
    print(
        f"\n{rows:,} rows with lengths, {-(-rows // STEP):,} steps. {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, duckdb {version('duckdb')}, torch {version('torch')}."
    )


if __name__ == "__main__":
    main()
