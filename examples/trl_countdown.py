"""Countdown with A-HPO in TRL, on this machine's CPU cores.

    python examples/trl_countdown.py                       # writes runs/trl/ahpo-seed0/{curves.png, metrics.jsonl}
    python examples/trl_countdown.py --policy hpo --steps 30 --seed 1

The script uses the start model, problems, reward and settings of ``hpo-plugin quickstart``, which trains with verl: 32
prompts with 8 responses per step, two updates per step, learning rate 3e-4, and held-out success from samples at
temperature 1. It needs the extras ``trl`` and ``cpu``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback

from hpo_plugin.quickstart.form import data_options, start_model_config
from hpo_plugin.quickstart.inputs import make_inputs
from hpo_plugin.runs.plots import draw_curves, save_curves
from hpo_plugin.tasks.task import laptop_form, load_task
from hpo_plugin.trl import HPOConfig, HPOTrainer
from hpo_plugin.variants import VARIANTS

PROMPTS, RESPONSES, UPDATES = 32, 8, 2
N_TEST = 512

#: TRL's metric -> verl's name for the same quantity, which the plots read.
NAMES = {
    "reward": "critic/rewards/mean",
    "hpo/alpha": "actor/hpo/alpha",
    "hpo/share_positive": "actor/hpo/share_positive",
    "hpo/share_negative": "actor/hpo/share_negative",
    "completions/mean_length": "response_length/mean",
    "eval_reward": "val-core/countdown/acc/mean@1",
}


class Rows(TrainerCallback):
    """Collects the log by generation batch: two optimizer steps of TRL are one step of the plots."""

    def __init__(self, console: Console) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.console = console

    def on_log(self, args: HPOConfig, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Keep the metrics of the plots, and print a line."""
        step = state.global_step // UPDATES
        found = {NAMES[name]: value for name, value in logs.items() if name in NAMES}
        self.rows.setdefault(step, {}).update(found)
        if "eval_reward" in logs:
            self.console.print(f"step {step:>3}  held-out success {100 * logs['eval_reward']:.1f} %")
        elif found:
            self.console.print(f"step {step:>3}  reward {logs['reward']:.3f}  α {logs['hpo/alpha']:.2f}")


def main() -> None:
    """Make the inputs, train, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=list(VARIANTS), default="ahpo")
    parser.add_argument("--steps", type=int, default=60, help="number of generation batches; each gives two updates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs"))
    given = parser.parse_args()
    console, task = Console(), load_task("countdown")
    folder = given.output / "trl" / f"{given.policy}-seed{given.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    disable_progress_bars()

    # The quickstart uses the same folders, so both train from the same files.
    key = f"{task.name}-seed{given.seed}-test{N_TEST}"
    sizes = {**laptop_form(task).quickstart, "test_size": N_TEST, "seed": given.seed}
    inputs = make_inputs(
        task,
        data_options(task, sizes),
        given.output / "data" / key,
        given.output / "models" / key,
        config=start_model_config(task, {}),
        seed=given.seed,
        logs=folder,
        console=console,
    )

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        named = zip(columns["data_source"], columns["reward_model"], completions, strict=True)
        return [
            float(task.score({"data_source": source, "reward_model": truth}, completion[0]["content"])["score"])
            for source, truth, completion in named
        ]

    train, test = (Dataset.from_parquet(str(file)) for file in (inputs.train_file, inputs.test_file))
    rows = Rows(console)
    trainer = HPOTrainer(
        model=str(inputs.model),
        reward_funcs=reward,
        args=HPOConfig(
            output_dir=str(folder),
            policy=given.policy,
            use_cpu=True,
            bf16=False,
            seed=given.seed,
            # A generation batch of 32 x 8 completions, trained on in two updates.
            per_device_train_batch_size=PROMPTS * RESPONSES // UPDATES,
            steps_per_generation=UPDATES,
            gradient_accumulation_steps=1,
            num_generations=RESPONSES,
            max_completion_length=32,
            max_steps=given.steps * UPDATES,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            # verl's dual clip.
            delta=3.0,
            # Held-out success: one sample of each problem.
            per_device_eval_batch_size=N_TEST,
            num_generations_eval=1,
            eval_strategy="steps",
            eval_steps=max(1, given.steps // 3) * UPDATES,
            eval_on_start=True,
            logging_steps=UPDATES,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=test,
        callbacks=[rows],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    metrics = dict(sorted(rows.rows.items()))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in metrics.items())
    )
    title = f"{task.title}, {VARIANTS[given.policy].title} in TRL, seed {given.seed}"
    save_curves(metrics, folder / "curves.png", title=title, n_test=N_TEST)
    console.print(draw_curves(metrics, width=console.width, color=console.is_terminal), markup=False, soft_wrap=True)
    console.print(f"Files in {folder}: curves.png, metrics.jsonl", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
