"""Trains a tiny model with TRL's ``GRPOTrainer`` and with ``HPOTrainer(observe=True)``, and compares the two runs.

Run as ``python observe_harness.py CASES OUT``, or under torchrun, as ``trl_harness.py``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl_harness as tiny
from trl import GRPOConfig, GRPOTrainer

from hpo_plugin.trl import HPOConfig, HPOTrainer

#: What depends on the clock.
TIMES = ("_time", "_runtime", "_per_second", "_minute")


def train(trainer_class: type[GRPOTrainer], config_class: type[GRPOConfig], case: dict[str, Any]) -> Any:
    """The parameters after training and an evaluation, the next random number, and the log."""
    with tempfile.TemporaryDirectory() as folder:
        evaluation = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 8}
        trainer = trainer_class(
            tiny.build_model(),
            tiny.reward,
            args=config_class(output_dir=folder, **{**tiny.DEFAULTS, **evaluation, **case}),
            train_dataset=tiny.prompts(),
            eval_dataset=tiny.prompts().select(range(16)),
            processing_class=tiny.build_tokenizer(),
        )
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
        parameters = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    log = [
        {name: value for name, value in entry.items() if not name.endswith(TIMES)}
        for entry in trainer.state.log_history
    ]
    return parameters, torch.rand(1).item(), log


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """What both runs of a case have in common, and what is observed."""
    before = torch.cat([parameter.detach().flatten() for parameter in tiny.build_model().parameters()])
    plain, random_of_plain, log_of_plain = train(GRPOTrainer, GRPOConfig, case)
    observed, random_of_observed, log = train(HPOTrainer, HPOConfig, case | {"observe": True})
    added = [{name: value for name, value in entry.items() if "hpo/" in name} for entry in log]
    rest = [{name: value for name, value in entry.items() if "hpo/" not in name} for entry in log]
    return {
        "moved": float((plain - before).abs().max()),
        "same_parameters": torch.equal(plain, observed),
        "same_random_number": random_of_plain == random_of_observed,
        "same_log": rest == log_of_plain,
        "observed": [entry for entry in added if entry],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases: dict[str, dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    results = {name: compare(case) for name, case in cases.items()}
    if int(os.environ.get("RANK", "0")) == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
