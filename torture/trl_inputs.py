"""Bad input to the algorithm through TRL: rewards of ``HPOTrainer``, from the reward function to the gradient.

The batches and the oracle are those of :mod:`torture.algorithm_inputs`. TRL is not a dependency of the development
environment: put its directory on ``PYTHONPATH``, or the cases fail, and the table says "not run".
"""

from __future__ import annotations

import logging
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpo_plugin.algorithm import RewardError
from torture.algorithm_inputs import ADVANTAGE, LARGEST, REWARDS, advantages_of, alpha_of, differs
from torture.probe import Probe, Result

#: Completions of a generation batch, and of a prompt.
ROWS, GROUP = 8, 4


class Judge:
    """A reward function that returns the rewards it is given."""

    __name__ = "judge"
    rewards: list[float | None]

    def __call__(self, completions: list[str], **_: Any) -> list[float | None]:
        """The rewards, whatever the completions are."""
        return self.rewards


def trainer(judge: Judge, folder: Path, **settings: Any) -> Any:
    """An ``HPOTrainer`` on a model with random weights; completions that do not end are masked."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from hpo_plugin.trl import HPOConfig, HPOTrainer

    characters = ["<pad>", "<eos>", *"ab"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(characters)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(characters),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    args = HPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=ROWS,
        num_generations=GROUP,
        max_completion_length=4,
        mask_truncated_completions=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    prompts = Dataset.from_dict({"prompt": ["a", "b"]})
    made = HPOTrainer(Qwen2ForCausalLM(config), judge, args, train_dataset=prompts, processing_class=tokenizer)
    made.model.train()
    # TRL's training loop sets it.
    made.current_gradient_accumulation_steps = 1
    return made


def check_trl(made: Any, judge: Judge, rng: random.Random) -> list[str]:
    """Generate with TRL's trainer and with this one, compare the advantages, and compute the gradient.

    A completion whose reward is None or NaN is not scored: TRL leaves it out of its group.
    """
    from trl import GRPOTrainer

    kind = rng.choice(list(REWARDS))
    values = [*REWARDS[kind], *([None] if rng.random() < 0.3 else [])]
    judge.rewards = [rng.choice(values) for _ in range(ROWS)]
    if rng.random() < 0.05:
        judge.rewards = [None] * ROWS
    judge.rewards = [value if value is None else float(torch.tensor(value)) for value in judge.rewards]
    inputs = [{"prompt": prompt} for prompt in "ab" for _ in range(GROUP)]
    seed = rng.randrange(2**31)
    torch.manual_seed(seed)
    theirs = GRPOTrainer._generate_and_score_completions(made, inputs)
    scored = [value is not None and not math.isnan(value) for value in judge.rewards]
    rewards = [value if ok and value is not None else 0.0 for value, ok in zip(judge.rewards, scored, strict=True)]
    bad = [row for row in range(ROWS) if not abs(rewards[row]) <= LARGEST]
    made._metrics["train"].clear()
    torch.manual_seed(seed)
    try:
        ours = made._generate_and_score_completions(inputs)
    except RewardError as error:
        return [] if error.rows == bad else [f"RewardError for rows {error.rows}, not {bad}: {judge.rewards}"]
    if bad:
        return [f"no error for the rewards of rows {bad}: {judge.rewards}"]
    if not torch.equal(ours["completion_ids"], theirs["completion_ids"]):
        return ["the two trainers generate different completions"]
    trained = ours["completion_mask"].any(dim=1).tolist()
    exact, _ = advantages_of(rewards, [row // GROUP for row in range(ROWS)], scored, by_std=False)
    # Next to the tolerance for equal rewards, fp32 decides the sign of TRL's advantages.
    plain = [a if e else 0.0 for a, e in zip(theirs["advantages"].tolist(), exact, strict=True)]
    counted = [a for a, ok in zip(plain, trained, strict=True) if ok]
    responses = sum(ok and judged for ok, judged in zip(trained, scored, strict=True))
    positive, negative = sum(a > 0 for a in counted), sum(a < 0 for a in counted)
    alpha = alpha_of(positive, negative, made.args.alpha_min)
    logged = {name: value for name, (value, *_) in made._metrics["train"].items() if name.startswith("hpo/")}
    wrong = [
        f"{name} is {logged[name]}, not {right}: {judge.rewards}"
        for name, right in {
            "hpo/alpha": alpha,
            "hpo/share_positive": positive / max(responses, 1),
            "hpo/share_negative": negative / max(responses, 1),
        }.items()
        if differs(logged[name], right, 1e-6)
    ]
    wrong += [f"{name} is {value}" for name, value in logged.items() if not math.isfinite(value)]
    expected = [alpha * a if a < 0 else a for a in plain]
    for row, (found, right, ok) in enumerate(zip(ours["advantages"].tolist(), expected, trained, strict=True)):
        if ok and differs(found, right, ADVANTAGE):
            wrong.append(f"row {row}: {found}, not {right}: {judge.rewards}")
    made.model.zero_grad()
    made.compute_loss(made.model, ours).backward()
    gradient = torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None])
    signal = any(ok and a for a, ok in zip(expected, trained, strict=True))
    largest = float(gradient.abs().max())
    if not math.isfinite(largest) or (largest > 0) != signal:
        wrong.append(f"the largest gradient is {largest}, with weighted advantages {expected}: {judge.rewards}")
    return wrong[:2]


def many(batches: int, seed: int, folder: Path, **settings: Any) -> Result:
    """Draw batches and check each; a failure names the seed of its batch."""
    torch.set_num_threads(1)
    # TRL warns about each batch with a completion that is not scored.
    logging.getLogger("trl").setLevel(logging.ERROR)
    judge, result = Judge(), Result()
    made = trainer(judge, folder, alpha_min=0.1, **settings)
    for number in range(seed, seed + batches):
        result.inputs += 1
        try:
            wrong = check_trl(made, judge, random.Random(number))
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        result.failures += [f"seed {number}: {line}" for line in wrong]
    return result


PROBES: tuple[Probe, ...] = (
    Probe(
        "algorithm-trl",
        "algorithm-inputs",
        "rewards for `HPOTrainer`, from the reward function to the gradient",
        "the oracle's advantages and α, and a gradient if one of them is not 0; or an error that names the rows",
        {
            scale: partial(many, 1000, k * 1000, scale_rewards=scale)
            for k, scale in enumerate(("group", "batch", "none"))
        },
    ),
)
