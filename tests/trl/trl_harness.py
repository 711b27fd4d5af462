"""Trains a tiny model with ``HPOTrainer``, and compares every optimizer step's gradient with the reference.

Run as ``python trl_harness.py CASE OUT``, or under torchrun: CASE is JSON, OUT gets the largest relative error and what
else the tests look at. The reference is ``hpo_loss`` on the whole batch of the optimizer step, over all processes and
micro-batches, with the plugin's own advantages from the rewards; of TRL it takes the tokens and the old log-probs.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ACCELERATE_USE_CPU": "true",
}

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from hpo_plugin.algorithm import adaptive_alpha, count_signs, group_relative_advantage, hpo_loss
from hpo_plugin.trl import HPOConfig, HPOTrainer

#: TRL adds it to a group's standard deviation.
TRL_EPSILON = 1e-4

CHARACTERS = ["<pad>", "<eos>", *"abcdefghijklmn"]

DEFAULTS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "num_generations": 4,
    "num_iterations": 2,
    "max_completion_length": 24,
    "max_steps": 6,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    # Large, so that ratios leave the clip range.
    "learning_rate": 0.5,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "ddp_backend": "gloo" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
    "seed": 1,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(CHARACTERS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """Two layers with random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def prompts() -> Dataset:
    """64 prompts of two to four characters."""
    return Dataset.from_dict({"prompt": ["abc"[: 1 + i % 3] + CHARACTERS[2 + i % 14] for i in range(64)]})


def reward(completions: list[str], **_: Any) -> list[float]:
    """Sparse, and no power of two: the mean of equal rewards is not always equal to them."""
    return [0.1 + 0.1 * (text[:1] in ("a", "b") or text[1:2] == "c") for text in completions]


def graded_reward(completions: list[str], **_: Any) -> list[float]:
    """Most are 0.4, some 0.1 or 0.7: where these two cancel, the mean is 0.4, up to rounding."""
    return [0.4 + 0.3 * ((text[:1] == "a") - (text[:1] == "c")) for text in completions]


class RecordingTrainer(HPOTrainer):
    """Keeps what the reference needs, and plants a fault where a case asks for one."""

    fault: str | None = None

    def _calculate_rewards(self, *arguments: Any, **options: Any) -> Any:
        rewards = super()._calculate_rewards(*arguments, **options)
        self.rewards = rewards[:, 0]
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        rows, rank = len(output["advantages"]), self.accelerator.process_index
        rewards = self.rewards
        groups = torch.arange(len(rewards)) // self.num_generations
        own = group_relative_advantage(rewards, groups, epsilon=TRL_EPSILON).advantage
        mask = output["completion_mask"]
        counts = count_signs(own, self.accelerator.gather(mask.any(dim=1)))
        settings = self.args.settings_of_policy()
        alpha = (
            float(adaptive_alpha(counts, settings["alpha_min"])) if self.args.policy == "ahpo" else settings["alpha"]
        )
        self.expected = {
            "advantages": own,
            "alpha": alpha,
            "tokens": float(self.accelerator.gather(mask.sum()).sum()),
        }
        output["row"] = torch.arange(rank * rows, (rank + 1) * rows)
        self.alphas.append((alpha, self._metrics["train"]["hpo/alpha"][-1]))
        if self.fault is not None:
            mine = own[output["row"]]
            local = count_signs(mine, mask.any(dim=1))
            wrong = 1.0 if self.fault == "no alpha" else float(adaptive_alpha(local, settings["alpha_min"]))
            output["advantages"] = torch.where(mine < 0, wrong * mine, mine)
        return output

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *arguments, **options)
        if self.model.training:
            names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "old_per_token_logps", "row")
            self.window.append({name: inputs[name] for name in names if name in inputs})
        return loss


class Compare(TrainerCallback):
    """Before each optimizer step, the gradient there is against the reference's."""

    def __init__(self) -> None:
        self.errors: list[float] = []
        self.largest_ratio = 0.0
        self.masked_rows = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compare, and put the gradient back."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = [p.grad.clone() for p in parameters]
        batches = gather_object(list(trainer.window))
        trainer.window.clear()
        width = max(batch["completion_ids"].shape[1] for batch in batches)
        columns: list[tuple[torch.Tensor, ...]] = []
        for batch in batches:
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            length = batch["completion_ids"].shape[1]
            logits = model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
            new = logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
            old = batch.get("old_per_token_logps", new.detach())
            columns.append(
                tuple(torch.nn.functional.pad(x, (0, width - length)) for x in (new, old, batch["completion_mask"]))
            )
        new, old, mask = (torch.cat(column) for column in zip(*columns, strict=True))
        expected = trainer.expected
        advantages = expected["advantages"][torch.cat([batch["row"] for batch in batches])]
        loss = hpo_loss(
            new,
            old,
            advantages.unsqueeze(1).expand(new.shape),
            mask,
            alpha=expected["alpha"],
            clip_low=args.epsilon,
            clip_high=args.epsilon_high or args.epsilon,
            clip_dual=args.delta,
        )
        # TRL divides by the tokens of the generation batch, shared over its optimizer steps.
        share = args.gradient_accumulation_steps / args.steps_per_generation
        loss = loss * float(mask.sum()) / (expected["tokens"] * share)
        model.zero_grad()
        loss.backward()
        reference = torch.cat([p.grad.flatten() for p in parameters])
        difference = reference - torch.cat([gradient.flatten() for gradient in found])
        self.errors.append(float(difference.norm() / reference.norm().clamp(min=1e-12)))
        self.largest_ratio = max(self.largest_ratio, float(((new - old).exp() - 1).abs()[mask.bool()].max()))
        self.masked_rows += int((mask.sum(dim=1) == 0).sum())
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train a case; the errors of its optimizer steps, and the logged metrics."""
    case = dict(case)
    dtype, fault = getattr(torch, case.pop("dtype", "float32")), case.pop("fault", None)
    graded = case.pop("graded", False)
    compare = Compare()
    with tempfile.TemporaryDirectory() as folder:
        trainer = RecordingTrainer(
            build_model(dtype),
            graded_reward if graded else reward,
            args=HPOConfig(output_dir=folder, **{**DEFAULTS, **case}),
            train_dataset=prompts(),
            processing_class=build_tokenizer(),
            callbacks=[compare],
        )
        trainer.fault, trainer.window, trainer.alphas, compare.trainer = fault, [], [], trainer
        trainer.train()
        return {
            "errors": compare.errors,
            "alphas": trainer.alphas,
            "largest_ratio": compare.largest_ratio,
            "masked_rows": compare.masked_rows,
            "log": [entry for entry in trainer.state.log_history if "hpo/alpha" in entry],
            "processes": trainer.accelerator.num_processes,
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases: dict[str, dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    results = {name: run(case) for name, case in cases.items()}
    if int(os.environ.get("RANK", "0")) == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
