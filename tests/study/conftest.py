import copy
from pathlib import Path

import numpy as np
import pytest
import yaml

from hpo_plugin.study.data import HELD_OUT, REWARD, STEP_SECONDS, CellData
from hpo_plugin.study.spec import load_study

#: Two arms, two settings, steps few enough to check by hand.
STUDY = {
    "name": "small",
    "title": "A small study",
    "config_name": "countdown_cpu",
    "steps": 4,
    "test_every": 2,
    "overrides": ["data.train_batch_size=8"],
    "scores": {"final_evaluations": 2, "early_fraction": 0.5},
    "settings": {"easy": {"title": "Easy"}, "hard": {"title": "Hard", "overrides": ["data.hard=1"]}},
    "arms": {
        "grpo": {"title": "GRPO", "overrides": ["algorithm.policy_loss=grpo"]},
        "ahpo": {"title": "A-HPO", "overrides": ["algorithm.policy_loss=ahpo"]},
    },
    "experiments": {
        "one": {"title": "One", "setting": "easy", "arms": ["grpo", "ahpo"], "seeds": [0, 1, 2], "compare": "ahpo"},
        "two": {"title": "Two", "setting": "hard", "arms": ["grpo", "ahpo"], "seeds": [0, 1], "compare": "ahpo"},
    },
}


@pytest.fixture
def declared():
    """The declaration of a study, to be changed."""
    return copy.deepcopy(STUDY)


@pytest.fixture
def load(tmp_path):
    """Writes a declaration and reads it."""

    def write_and_load(declaration):
        path = Path(tmp_path / "study.yaml")
        path.write_text(yaml.safe_dump(declaration, sort_keys=False), encoding="utf-8")
        return load_study(path)

    return write_and_load


def made_up(cell, *, reward=0.1, held_out=0.2, inputs="same"):
    """The data of a finished cell: training reward rises by 0.1 a step, held-out success by 0.1 an evaluation."""
    rows = {0: {HELD_OUT: held_out - 0.1}}
    for step in range(1, cell.steps + 1):
        rows[step] = {REWARD: reward + 0.1 * (step - 1), STEP_SECONDS: 2.0, "response_length/mean": 8.0}
        rows[step] |= {"actor/hpo/alpha": 0.2 * step if "ahpo" in cell.overrides[-4] else 1.0}
        rows[step] |= {"actor/hpo/share_positive": 0.1, "actor/hpo/share_negative": 0.5}
        if step % 2 == 0:
            rows[step][HELD_OUT] = held_out + 0.1 * (step // 2 - 1)
    info = {"cell": cell.request(), "inputs": inputs, "start": None, "attempts": 1, "result": {"steps": cell.steps}}
    return CellData.of(cell, rows, info)


@pytest.fixture
def data(declared, load):
    """Data of all cells: A-HPO better than GRPO by 0.05 in every seed, seeds 0.01 apart."""
    made = {}
    for cell in load(declared).cells():
        better = 0.05 * (cell.arm == "ahpo")
        shift = np.round(better + 0.01 * cell.seed, 2)
        made[cell.key] = made_up(cell, reward=0.1 + shift, held_out=0.2 + shift)
    return made


@pytest.fixture
def make_data():
    """Makes the data of a finished cell."""
    return made_up
