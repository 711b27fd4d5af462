"""``hpo-plugin quickstart`` with less data and a start model that is trained for a few steps.

The arguments are those of ``hpo-plugin``. The probes of ``torture/faults.py`` start this module.
"""

from __future__ import annotations

import runpy
from dataclasses import replace

from hpo_plugin.tasks.countdown.task import Countdown
from hpo_plugin.tasks.telelogs.task import TeleLogs


def main() -> None:
    """Reduce the laptop form of the tasks, and run the command."""
    countdown, telelogs = Countdown.laptop, TeleLogs.laptop
    assert countdown is not None
    assert telelogs is not None
    Countdown.laptop = replace(countdown, start_model={"steps": 60})
    TeleLogs.laptop = replace(telelogs, quickstart={"train_size": 64}, sft_epochs=2)
    runpy.run_module("hpo_plugin.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
