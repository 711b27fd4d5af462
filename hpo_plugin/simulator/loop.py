"""verl's synchronous PPO loop for a config of verl, in this process.

Advantages and losses are the functions that verl's registries hold for the config, so an algorithm is what it is in
verl. Sampling, scoring and the optimizer's step follow ``RayPPOTrainer.fit`` (verl/trainer/ppo/ray_trainer.py) and
``FSDPEngine`` (verl/workers/engine/fsdp/transformer_impl.py) for one fp32 process. What the loop does not have is
refused (:func:`check_simulated`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from hpo_plugin import algorithm
from hpo_plugin.errors import ConfigError
from hpo_plugin.metrics import step_metrics
from hpo_plugin.simulator.model import Samples, SmallQwen2
from hpo_plugin.variants import VARIANTS
from hpo_plugin.verl import metrics as verl_metrics
from hpo_plugin.verl.selection import read_settings

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
#: Config key -> the values that the loop implements. ``hpo_plugin.simulator`` refuses others.
SIMULATED: Mapping[str, tuple[Any, ...]] = {
    "algorithm.use_kl_in_reward": (False,),
    "algorithm.filter_groups.enable": (False,),
    "algorithm.rollout_correction.rollout_is": (None,),
    "algorithm.rollout_correction.rollout_rs": (None,),
    "algorithm.rollout_correction.bypass_mode": (False,),
    "data.shuffle": (True,),
    f"{_ACTOR}.use_kl_loss": (False,),
    f"{_ACTOR}.entropy_coeff": (0,),
    f"{_ACTOR}.shuffle": (False,),
    f"{_ACTOR}.optim.optimizer": ("AdamW",),
    f"{_ACTOR}.optim.lr_scheduler_type": ("constant",),
    f"{_ACTOR}.optim.lr_warmup_steps": (-1, 0),
    f"{_ACTOR}.optim.lr_warmup_steps_ratio": (0,),
    f"{_ACTOR}.optim.override_optimizer_config": (None,),
    "actor_rollout_ref.model.lora_rank": (0,),
    f"{_ROLLOUT}.temperature": (1,),
    f"{_ROLLOUT}.top_p": (1,),
    f"{_ROLLOUT}.top_k": (-1,),
    f"{_ROLLOUT}.multi_turn.enable": (False,),
    f"{_ROLLOUT}.val_kwargs.do_sample": (True,),
    f"{_ROLLOUT}.val_kwargs.temperature": (1,),
    f"{_ROLLOUT}.val_kwargs.top_p": (1,),
    f"{_ROLLOUT}.val_kwargs.top_k": (-1,),
}
#: Seeds of the evaluations lie beyond those of the steps.
_EVALUATION = 1 << 20


@dataclass(frozen=True)
class Update:
    """What an observer sees of a step, between the estimation of advantages and the first optimizer step.

    Attributes:
        step: From 1.
        prompts: Token ids of each row's prompt.
        samples: The responses.
        advantages: fp32 [rows], before α is applied, 0 in groups without a signal.
        alpha: α of the step.
        adaptive_alpha: α that A-HPO has for this batch with the config's α_min, whatever the algorithm is.
        loss_agg_mode: How the loss is aggregated, in verl's terms.
        model: The policy.
        optimizer: Its AdamW.
    """

    step: int
    prompts: Sequence[Sequence[int]]
    samples: Samples
    advantages: Tensor
    alpha: float
    adaptive_alpha: float
    loss_agg_mode: str
    model: SmallQwen2
    optimizer: torch.optim.AdamW


#: Returns further metrics of a step.
Observer = Callable[[Update], Mapping[str, float]]


def check_simulated(config: DictConfig) -> None:
    """Check that the loop implements a config of verl.

    Raises:
        ConfigError: It does not; names the key and the value.
    """
    algorithms = {
        "algorithm.adv_estimator": ("grpo", *VARIANTS),
        # Losses that are a product with the advantage: rows without one are left out (:meth:`_Loop._update`).
        f"{_ACTOR}.policy_loss.loss_mode": ("vanilla", "gspo", "sapo", *VARIANTS),
    }
    for key, known in {**SIMULATED, **algorithms}.items():
        value = OmegaConf.select(config, key)
        if value not in known:
            values = " or ".join(map(str, known))
            raise ConfigError(
                f"{key}={value}: the simulator supports only {values}. Use verl's trainer for this config."
            )


def simulate(config: DictConfig, observe: Observer | None = None) -> Iterator[tuple[int, dict[str, float]]]:
    """Train under a config of verl.

    Args:
        config: verl's root config, composed, with plugins' presets resolved.
        observe: Called in every step.

    Yields:
        Step and metrics, by verl's names; step 0 is the evaluation before training. ``actor/pg_clipfrac`` is a share of
        all response tokens, as in verl; ``actor/ppo_kl`` is not computed.

    Raises:
        ConfigError: The loop does not implement the config.
    """
    check_simulated(config)
    loop = _Loop(config)
    steps, test_every = int(config.trainer.total_training_steps), int(config.trainer.test_freq)
    if config.trainer.val_before_train:
        yield 0, loop.evaluate(0)
    for step in range(1, steps + 1):
        metrics = loop.step(step, observe)
        if step == steps or (test_every > 0 and step % test_every == 0):
            metrics |= loop.evaluate(step)
        yield step, metrics


class _Loop:
    """Model, optimizer, data and reward of one training."""

    def __init__(self, config: DictConfig) -> None:
        from transformers import AutoTokenizer
        from verl.trainer.ppo import core_algos
        from verl.trainer.ppo.reward import get_custom_reward_fn
        from verl.trainer.ppo.utils import create_rl_sampler
        from verl.utils.config import omega_conf_to_dataclass

        actor = config.actor_rollout_ref.actor
        self._config = config
        self._actor = omega_conf_to_dataclass(actor)
        self._estimate = core_algos.get_adv_estimator_fn(config.algorithm.adv_estimator)
        self._loss = core_algos.get_policy_loss_fn(actor.policy_loss.loss_mode)
        self._score = get_custom_reward_fn(config)
        if self._score is None:
            raise ConfigError(
                "reward.custom_reward_function.path=null: the simulator needs the task's reward function. Set the path."
            )
        directory = Path(config.actor_rollout_ref.model.path)
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = SmallQwen2.load(directory)
        optim = actor.optim
        self._optimizer = torch.optim.AdamW(
            self._model.parameters, lr=optim.lr, betas=tuple(optim.betas), weight_decay=optim.weight_decay
        )
        self._train, self._test = self._rows(config.data.train_files), self._rows(config.data.val_files)
        sampler = create_rl_sampler(config.data, self._train)
        self._batches = _batches(sampler, int(config.data.train_batch_size))

    def _rows(self, file: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
        for row in rows:
            text = self._tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
            row["ids"] = self._tokenizer.encode(text, add_special_tokens=False)
        return rows

    def _sample(self, rows: Sequence[Mapping[str, Any]], count: int, seed: int) -> tuple[list[Any], Samples, Tensor]:
        """Sample ``count`` responses of each row; return the rows, repeated, the responses and their scores."""
        repeated = [row for row in rows for _ in range(count)]
        generator = torch.Generator().manual_seed((int(self._config.data.seed) << 24) + seed)
        length = int(self._config.data.max_response_length)
        samples = self._model.sample([row["ids"] for row in repeated], length, generator)
        responses = [tokens[kept] for tokens, kept in zip(samples.tokens, samples.mask, strict=True)]
        texts = self._tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = []
        for row, text in zip(repeated, texts, strict=True):
            scored = self._score(
                data_source=row["data_source"],
                solution_str=text,
                ground_truth=row["reward_model"]["ground_truth"],
                extra_info=row.get("extra_info") or {},
            )
            scores.append(float(scored["score"] if isinstance(scored, dict) else scored))
        return repeated, samples, torch.tensor(scores)

    def evaluate(self, step: int) -> dict[str, float]:
        """Mean score on the held-out rows, under verl's name."""
        count = int(self._config.actor_rollout_ref.rollout.val_kwargs.n)
        _, _, scores = self._sample(self._test, count, _EVALUATION + step)
        source = self._test[0]["data_source"]
        return {f"val-core/{source}/reward/mean@{count}": float(scores.mean())}

    def step(self, step: int, observe: Observer | None) -> dict[str, float]:
        """One rollout batch and its optimizer steps."""
        began = time.perf_counter()
        config, n = self._config, int(self._config.actor_rollout_ref.rollout.n)
        rows, samples, scores = self._sample([self._train[k] for k in next(self._batches)], n, step)
        sampled = time.perf_counter()
        prompts = [row["ids"] for row in rows]
        mask, groups = samples.mask, torch.arange(len(rows)).div(n, rounding_mode="floor")
        lengths = mask.sum(dim=1)
        rewards = torch.zeros(mask.shape)
        rewards[torch.arange(len(rows)), lengths - 1] = scores
        verl_metrics.drain()
        advantages, _ = self._estimate(
            token_level_rewards=rewards,
            response_mask=mask.float(),
            index=np.array([str(int(group)) for group in groups], dtype=object),
            config=config.algorithm,
        )
        # What the plugin's estimators record. Others record nothing, and apply no α.
        metrics = verl_metrics.drain()
        plain = algorithm.hysteretic_advantage(
            scores, groups, lambda counts: 1.0, valid=torch.ones(len(rows), dtype=torch.bool), lengths=lengths
        )
        if not metrics:
            metrics = {f"actor/{name}": value for name, value in step_metrics([plain.statistics]).items()}
        if observe is not None:
            settings, _ = read_settings(config.algorithm.get("hpo"))
            seen = Update(
                step=step,
                prompts=prompts,
                samples=samples,
                advantages=plain.advantage.float(),
                alpha=metrics["actor/hpo/alpha"],
                adaptive_alpha=float(algorithm.adaptive_alpha(plain.counts, settings["alpha_min"])),
                loss_agg_mode=self._actor.loss_agg_mode,
                model=self._model,
                optimizer=self._optimizer,
            )
            metrics |= observe(seen)
        metrics |= self._update(prompts, samples, advantages, int(self._actor.ppo_mini_batch_size) * n)
        ended = time.perf_counter()
        return metrics | {
            "critic/rewards/mean": float(scores.mean()),
            "response_length/mean": float(lengths.float().mean()),
            "response_length/min": float(lengths.min()),
            "response_length/max": float(lengths.max()),
            "response_length/clip_ratio": float((lengths == int(config.data.max_response_length)).float().mean()),
            "actor/entropy": float(samples.entropy.sum() / mask.sum()),
            "perf/total_num_tokens": float(lengths.sum() + sum(map(len, prompts))),
            "timing_s/step": ended - began,
            "timing_s/gen": sampled - began,
            "timing_s/update_actor": ended - sampled,
        }

    def _update(
        self, prompts: Sequence[Sequence[int]], samples: Samples, advantages: Tensor, rows_per_update: int
    ) -> dict[str, float]:
        """The optimizer steps of a rollout batch: mini-batches in order, as often as ``ppo_epochs`` says."""
        norms, clipped = [], []
        for _ in range(int(self._actor.ppo_epochs)):
            for begin in range(0, len(prompts), rows_per_update):
                rows = torch.arange(begin, min(begin + rows_per_update, len(prompts)))
                tokens = int(samples.mask[rows].sum())
                self._actor.global_batch_info.update(
                    dp_size=1,
                    batch_num_tokens=tokens,
                    global_batch_size=len(rows),
                    loss_scale_factor=self._actor.loss_scale_factor,
                )
                # The losses are products with the advantage: rows without one add nothing to the gradient.
                chosen = rows[(advantages[rows] != 0).any(dim=1)]
                share = 0.0
                for parameter in self._model.parameters:
                    parameter.grad = torch.zeros_like(parameter)
                if len(chosen):
                    mask = samples.mask[chosen]
                    log_prob = self._model.log_probs([prompts[row] for row in chosen], samples.tokens[chosen], mask)
                    loss, metrics = self._loss(
                        old_log_prob=samples.log_probs[chosen],
                        log_prob=log_prob,
                        advantages=advantages[chosen],
                        response_mask=mask,
                        loss_agg_mode=self._actor.loss_agg_mode,
                        config=self._actor,
                        rollout_is_weights=None,
                    )
                    loss.backward()
                    share = float(metrics["actor/pg_clipfrac"]) * int(mask.sum()) / tokens
                norm = torch.nn.utils.clip_grad_norm_(self._model.parameters, float(self._actor.optim.clip_grad))
                if bool(torch.isfinite(norm)):
                    self._optimizer.step()
                norms.append(float(norm))
                clipped.append(share)
        return {"actor/grad_norm": float(np.mean(norms)), "actor/pg_clipfrac": float(np.mean(clipped))}


def _batches(sampler: Any, size: int) -> Iterator[list[int]]:
    """Indices of the training rows, a batch at a time, without end; the rest of an epoch is dropped, as in verl."""
    while True:
        epoch = list(sampler)
        yield from (epoch[begin : begin + size] for begin in range(0, len(epoch) - size + 1, size))
