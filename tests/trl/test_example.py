"""``examples/trl_countdown.py`` trains and draws its picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", minversion="1.10", exc_type=ImportError, reason="TRL is not installed (make test-trl)")

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_example_trains_and_draws(tmp_path):
    script = ROOT / "examples" / "trl_countdown.py"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(script), "--steps", "3", "--output", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "trl" / "ahpo-seed0"
    assert (folder / "curves.png").stat().st_size > 10_000
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(0.1 <= row["data"]["actor/hpo/alpha"] <= 1 for row in rows[1:])
    assert all(0 < row["data"]["val-core/countdown/acc/mean@1"] < 1 for row in rows)
