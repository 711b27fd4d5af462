"""SIGKILL of a training with ``HPOTrainer`` in TRL.

``python -m torture.trl_faults DIRECTORY`` is the training that the cases kill. verl cannot be imported beside a new
TRL, so only this training gets the TRL that ``make test-trl`` has installed, if there is one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torture.faults import ROOT, SEED, Subject, can_load, kill_probe

#: Generation batches of a run, and optimizer steps of each.
BATCHES, UPDATES = 8, 2
#: Steps between checkpoints. A multiple of the steps of a generation batch, because TRL does not save the batch.
SAVE_EVERY = 2 * UPDATES
STEPS = BATCHES * UPDATES
COMPARED = ("reward", "hpo/alpha", "hpo/share_positive", "hpo/share_negative", "completions/mean_length", "loss")


def last_whole(work: Path) -> int | None:
    """The newest checkpoint with all files; ``transformers`` writes ``trainer_state.json`` last."""
    steps = []
    for path in (work / "trl").glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_bytes())
        except (OSError, ValueError):
            continue
        if state["global_step"] == int(path.name.rpartition("-")[2]):
            steps.append(state["global_step"])
    return max(steps, default=None)


def train(work: Path) -> None:
    """Train, or resume from the newest whole checkpoint.

    Args:
        work: Directory with ``model`` and ``train.parquet``; the output is in ``trl``.
    """
    from datasets import Dataset, disable_progress_bars
    from transformers import TrainerCallback

    from hpo_plugin.trl import HPOConfig, HPOTrainer

    class Marks(TrainerCallback):
        """Appends a line for each logged step."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            with (work / "marks.txt").open("a") as file:
                file.write(f"{state.global_step}\n")

    disable_progress_bars()
    step = last_whole(work)
    with (work / "resumes.jsonl").open("a") as file:
        file.write(json.dumps(step) + "\n")
    if step == STEPS:
        # From the checkpoint of the last step, Trainer would train one more.
        return

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        return [float(sum(map(ord, completion[0]["content"])) % 4 == 0) for completion in completions]

    trainer = HPOTrainer(
        model=str(work / "model"),
        reward_funcs=reward,
        args=HPOConfig(
            output_dir=str(work / "trl"),
            policy="ahpo",
            use_cpu=True,
            bf16=False,
            seed=SEED,
            per_device_train_batch_size=16,
            steps_per_generation=UPDATES,
            gradient_accumulation_steps=1,
            num_generations=8,
            max_completion_length=16,
            max_steps=STEPS,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            logging_steps=UPDATES,
            save_strategy="steps",
            save_steps=SAVE_EVERY,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_parquet(str(work / "train.parquet")),
        callbacks=[Marks()],
    )
    trainer.train(resume_from_checkpoint=None if step is None else str(work / "trl" / f"checkpoint-{step}"))


# --- the subject ---------------------------------------------------------------------------------------------------


def command(work: Path) -> tuple[list[str], dict[str, str]]:
    """The training, in a work directory."""
    paths = [str(ROOT), *map(str, sorted(Path(sys.prefix).glob("trl-*"))[-1:]), os.environ.get("PYTHONPATH", "")]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    return [sys.executable, "-m", "torture.trl_faults", str(work)], environment


def prepare(folder: Path) -> None:
    """Write 32 problems, eight generation batches, and a model of random weights."""
    from hpo_plugin.quickstart.start_model import save_untrained_model
    from hpo_plugin.tasks.countdown.dataset import prepare_countdown
    from hpo_plugin.tasks.countdown.problems import CountdownConfig

    problems = CountdownConfig(counts=(3,), max_number=12)
    made = prepare_countdown(folder / "data", config=problems, layout="terse", train_size=24, test_size=8)
    made.files["train"].rename(folder / "train.parquet")
    save_untrained_model(folder / "model", seed=SEED)


def history(work: Path) -> list[tuple[int, dict[str, Any]]]:
    """The logged steps of a finished run: the history in its last checkpoint."""
    state = json.loads((work / "trl" / f"checkpoint-{STEPS}" / "trainer_state.json").read_bytes())
    return [(row["step"], row) for row in state["log_history"]]


def loadable(work: Path) -> int | None:
    """The newest checkpoint with all files that can be loaded."""
    from safetensors.torch import load_file

    steps = []
    for path in (work / "trl").glob("checkpoint-*"):
        try:
            load_file(path / "model.safetensors")
            state = json.loads((path / "trainer_state.json").read_bytes())
        except Exception:
            continue
        if can_load([path / name for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]):
            steps.append(state["global_step"])
    return max(steps, default=None)


def resumes(work: Path) -> list[int | None]:
    """The step that each process has resumed from."""
    path = work / "resumes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


TRL = Subject(
    name="trl",
    steps=range(UPDATES, STEPS + 1, UPDATES),
    command=command,
    marks=("marks.txt", "resumes.jsonl"),
    roles={"launcher": ""},
    inputs=("model", "train.parquet"),
    rows=history,
    compared=COMPARED,
    alpha=("hpo/alpha", "hpo/share_positive", "hpo/share_negative"),
    last_whole=loadable,
    resumes=resumes,
    incomplete=lambda work: [] if loadable(work) == STEPS else ["the last checkpoint is not whole"],
    prepare=prepare,
)
PROBES = (kill_probe(TRL, "launcher", 14, "SIGKILL of a training with `HPOTrainer` in TRL"),)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
