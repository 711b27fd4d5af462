"""Runs OpenRLHF's ``ppo_train`` on CPU with α applied, and compares every optimizer step's gradient with the reference.

Run as ``python openrlhf_harness.py CASES OUT``, or under torchrun: CASES is JSON, OUT gets, for each case, the relative
errors and what else the tests look at. The reference is ``hpo_loss`` on the whole batch of the optimizer step, over all
processes and micro-batches, with the plugin's own advantages from the rewards. Of OpenRLHF run: parser, micro-batches,
advantages, replay buffer, loss, its normalization, and training loop, with DeepSpeed over gloo. Responses are random.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import runpy
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
sys.path.append(str(Path(__file__).with_name("stand_ins")))

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from openrlhf.models import Actor
from openrlhf.trainer.ppo_utils.experience import Experience, balance_experiences
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer
from openrlhf.utils import get_strategy
from transformers import Qwen2Config, Qwen2ForCausalLM

from hpo_plugin.algorithm import adaptive_alpha, count_signs, group_relative_advantage, hpo_loss
from hpo_plugin.errors import ConfigError
from hpo_plugin.openrlhf import hook
from hpo_plugin.openrlhf.experience import check_arguments
from hpo_plugin.variants import resolve

#: OpenRLHF adds it to a group's standard deviation.
OPENRLHF_EPSILON = 1e-9

PROMPT, RESPONSE, WORDS = 3, 20, 16
#: What a command line of OpenRLHF names for HPO, at the size of these tests: 8 prompts, 8 responses each.
REQUIRED = ["--algo.advantage.estimator", "group_norm", "--algo.kl.init_coef", "0"]
OPTIONS: dict[str, Any] = {
    "rollout.batch_size": 8,
    "rollout.n_samples_per_prompt": 8,
    "rollout.micro_batch_size": 4,
    "train.batch_size": 64,
    "train.micro_batch_size": 4,
    "actor.eps_clip_low_high": (0.2, 0.2),
    "actor.num_gpus_per_node": int(os.environ.get("WORLD_SIZE", "1")),
    "ds.zero_stage": 0,
}


def parse(arguments: list[str]) -> SimpleNamespace:
    """Arguments as OpenRLHF's command parses them, before it starts anything."""
    parsed: list[SimpleNamespace] = []

    def take(flat: Any) -> None:
        parsed.append(hierarchize(flat))
        raise StopIteration

    from openrlhf.utils.config import hierarchize

    with (
        mock.patch("openrlhf.utils.config.hierarchize", take),
        mock.patch.object(sys, "argv", ["train_ppo_ray", *arguments]),
    ):
        try:
            runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
        except StopIteration:
            return parsed[0]
    raise AssertionError("OpenRLHF's command does not call hierarchize")


def words(options: dict[str, Any]) -> list[str]:
    """``{"actor.dual_clip": 3}`` as a command line."""
    line: list[str] = []
    for name, value in options.items():
        line += [f"--{name}"] if value is True else [f"--{name}", *map(str, value if type(value) is tuple else [value])]
    return line


class _Cpu(str):
    """The answer of ``torch.cuda.current_device()``: a device that is a CPU, and the number 0 in ``cuda:0``."""

    def __format__(self, _: str) -> str:
        return "0"


@contextmanager
def without_cuda() -> Any:
    """OpenRLHF asks for the current CUDA device, sets it, and waits for it."""
    from openrlhf.utils.deepspeed import deepspeed as module

    mesh = module.init_device_mesh
    with (
        mock.patch("torch.cuda.current_device", return_value=_Cpu("cpu")),
        mock.patch("torch.cuda.set_device", return_value=None),
        mock.patch("torch.cuda.synchronize", return_value=None),
        mock.patch.object(module, "init_device_mesh", lambda _, *shape, **names: mesh("cpu", *shape, **names)),
    ):
        yield


@contextmanager
def refused(args: SimpleNamespace) -> Any:
    """What the adapter does not accept runs nevertheless.

    Raises:
        AssertionError: The adapter accepts it.
    """
    try:
        check_arguments(args)
    except ConfigError:
        with mock.patch("hpo_plugin.openrlhf.experience.check_arguments"):
            yield
    else:
        raise AssertionError("the adapter accepts these arguments")


def build_model() -> Qwen2ForCausalLM:
    """Two layers with random weights."""
    config = Qwen2Config(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return Qwen2ForCausalLM(config)


def rollout(count: int, graded: bool) -> list[Experience]:
    """Responses of random tokens, as OpenRLHF's generator returns them: one each, prompt and response, no padding.

    Rewards are sparse and inexact in binary, and those of the first group are equal. Graded ones are 0.4, some 0.1 or
    0.7: where these two cancel, the mean is 0.4 up to rounding.
    """
    lengths = torch.randint(1, RESPONSE + 1, (count,)).tolist()
    rewards = 0.1 + 0.1 * (torch.rand(count) < 0.15)
    rewards[:8] = 0.1
    if graded:
        rewards = 0.4 + 0.3 * torch.multinomial(torch.tensor([0.06, 0.74, 0.2]), count, replacement=True).sub(1)
    samples = []
    for length, reward in zip(lengths, rewards, strict=True):
        total = PROMPT + length
        action_mask = torch.zeros(1, total - 1, dtype=torch.long)
        action_mask[:, PROMPT - 1 :] = 1
        # The middle of a long response is the output of a tool.
        action_mask[:, PROMPT + 6 : PROMPT + 9] = 0 if length > 12 else action_mask[:, PROMPT + 6 : PROMPT + 9]
        samples.append(
            Experience(
                sequences=torch.randint(0, WORDS, (1, total)),
                attention_mask=torch.ones(1, total, dtype=torch.long),
                action_mask=action_mask,
                rewards=reward.reshape(1).clone(),
                response_length=torch.tensor([length]),
                truncated=torch.tensor([False]),
                total_length=torch.tensor([float(total)]),
                info={"reward": reward.reshape(1).clone()},
            )
        )
    return samples


class Reference:
    """The whole batch, padded, with advantages and α that were computed from the rewards alone."""

    def __init__(
        self, samples: list[Experience], args: SimpleNamespace, policy: Any, settings: dict[str, float]
    ) -> None:
        batch = Experience.concat_experiences(copy.deepcopy(samples), 0)
        self.args, self.sequences, self.attention = args, batch.sequences, batch.attention_mask
        self.mask = batch.action_mask.bool()
        rewards, size = batch.rewards.clone(), args.rollout.n_samples_per_prompt
        if args.reward.overlong_buffer_len is not None:
            free = args.rollout.max_new_tokens - args.reward.overlong_buffer_len
            rewards -= (batch.response_length - free).clamp(min=0) / args.reward.overlong_buffer_len
        self.advantages = group_relative_advantage(
            rewards,
            torch.arange(len(rewards)) // size,
            normalize_by_std=args.algo.advantage.estimator == "group_norm",
            epsilon=OPENRLHF_EPSILON,
        ).advantage
        counts = count_signs(self.advantages)
        self.alpha = (
            float(adaptive_alpha(counts, settings["alpha_min"])) if policy.name == "ahpo" else settings["alpha"]
        )

    def log_probs(self, model: Any) -> torch.Tensor:
        """(N, T − 1) of all tokens but the first."""
        logits = model(self.sequences, attention_mask=self.attention).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, self.sequences[:, 1:].unsqueeze(-1)).squeeze(-1)

    def gradient(
        self, model: Any, old: torch.Tensor, base: torch.Tensor | None, rows: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """Of the loss of some rows, with a KL loss (k3) where there is a base; and how far their ratios are from 1."""
        model.zero_grad()
        new = self.log_probs(model)
        loss = hpo_loss(
            new[rows],
            old[rows],
            self.advantages[rows].unsqueeze(1).expand(len(rows), new.shape[1]),
            self.mask[rows],
            alpha=self.alpha,
            clip_dual=self.args.actor.dual_clip,
        )
        if base is not None:
            difference = (base - new)[rows][self.mask[rows]]
            loss = loss + self.args.algo.kl.init_coef * (difference.exp() - 1 - difference).mean()
        loss.backward()
        ratios = (new - old)[rows][self.mask[rows]].exp()
        return torch.cat([p.grad.flatten() for p in model.parameters()]), float((ratios.detach() - 1).abs().max())


def plant(fault: str, experiences: list[Experience], settings: dict[str, float], world: int) -> None:
    """Apply an α of a part of the batch, to advantages that have none."""
    parts = [[experience] for experience in experiences]
    if fault == "alpha of each process":
        share = -(-len(experiences) // world)
        parts = [experiences[i : i + share] for i in range(0, len(experiences), share)]
    for part in parts:
        sums = torch.cat([experience.advantages.sum(dim=1) for experience in part])
        alpha = 1.0 if fault == "no alpha" else float(adaptive_alpha(count_signs(sums), settings["alpha_min"]))
        for experience in part:
            experience.advantages = torch.where(experience.advantages < 0, alpha, 1.0) * experience.advantages


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train on one rollout batch; the errors of its optimizer steps, and what OpenRLHF logs."""
    rank, world = dist.get_rank(), dist.get_world_size()
    args = parse(REQUIRED + words(OPTIONS | case.get("options", {})))
    policy, settings = resolve(case.get("policy", "ahpo"), case.get("settings", {}))
    fault = case.get("fault")
    args.hpo = SimpleNamespace(variant=policy, settings=settings)
    if fault is not None:
        args.hpo = SimpleNamespace(variant=resolve("hpo", {})[0], settings={"alpha": 1.0})
    strategy = get_strategy(args)
    strategy.setup_distributed()
    torch.manual_seed(case.get("seed", 1))
    model = build_model()
    samples = rollout(args.rollout.batch_size * args.rollout.n_samples_per_prompt, case.get("graded", False))
    reference = Reference(samples, args, policy, settings)
    with torch.no_grad():
        log_probs = reference.log_probs(model)
        old, base = log_probs + 0.25 * torch.randn(reference.mask.shape), None
        if args.algo.kl.use_loss:
            base = log_probs + 0.25 * torch.randn(reference.mask.shape)

    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    kl, tokenizer = SimpleNamespace(value=args.algo.kl.init_coef), SimpleNamespace(pad_token_id=0)
    maker = RemoteExperienceMaker(None, None, None, None, kl, strategy, tokenizer)
    experiences = maker.split_rollout_samples(samples)
    for experience in experiences:
        experience.action_log_probs = old[experience.index, : experience.action_mask.shape[1]]
        if base is not None:
            experience.base_action_log_probs = base[experience.index, : experience.action_mask.shape[1]]
        experience.kl = torch.zeros_like(experience.action_log_probs)
    with refused(args) if case.get("refused") else nullcontext():
        experiences = maker.compute_advantages_and_returns(experiences)
    for experience in experiences:
        experience.info["row"] = torch.tensor(experience.index)
    if fault is not None:
        plant(fault, experiences, settings, world)
    order = [row for experience in experiences for row in experience.index]
    if args.train.dynamic_batch_enable:
        experiences = balance_experiences(experiences, args)

    actor, twin = Actor(model), copy.deepcopy(model)
    actor.packing_samples = False
    stage, dynamic = args.ds.zero_stage, args.train.dynamic_batch_enable
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        config={
            "train_micro_batch_size_per_gpu": 1 if dynamic else args.train.micro_batch_size,
            "gradient_accumulation_steps": 1 if dynamic else strategy.accumulated_gradient,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        },
    )
    actor.model = engine
    trainer = ActorPPOTrainer(
        strategy,
        actor,
        ema_model=None,
        actor_optim=None,
        actor_scheduler=SimpleNamespace(get_last_lr=lambda: [0.5]),
        micro_train_batch_size=args.train.micro_batch_size,
        dataloader_pin_memory=False,
    )
    # As OpenRLHF sends them: neighbors to one process.
    share = -(-len(experiences) // world)
    for experience in experiences[rank * share : (rank + 1) * share]:
        trainer.replay_buffer.append(experience)

    errors: list[float] = []
    largest: list[float] = []
    window: list[int] = []
    training_step, optimizer_step = trainer.training_step, strategy.optimizer_step

    def recorded(experience: Experience, *more: Any) -> Any:
        window.extend(int(row) for row in experience.info["row"])
        return training_step(experience, *more)

    def compared(*arguments: Any, **names: Any) -> None:
        if engine.is_gradient_accumulation_boundary():
            rows: list[Any] = [None] * world
            dist.all_gather_object(rows, window)
            window.clear()
            found = torch.cat([safe_get_full_grad(p).flatten() for p in model.parameters()])
            with torch.no_grad():
                for copied, p in zip(twin.parameters(), model.parameters(), strict=True):
                    copied.copy_(safe_get_full_fp32_param(p) if stage else p)
            wanted, ratio = reference.gradient(twin, old, base, torch.tensor(list(itertools.chain(*rows))))
            errors.append(float((found - wanted).norm() / wanted.norm()))
            largest.append(ratio)
        optimizer_step(*arguments, **names)

    trainer.training_step, strategy.optimizer_step = recorded, compared
    status = trainer.ppo_train(args.algo.kl.init_coef)
    return {
        "errors": errors,
        "alpha": reference.alpha,
        "largest_ratio": max(largest),
        "status": {name: float(value) for name, value in status.items()},
        "permuted": order != sorted(order),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0")
    dist.init_process_group("gloo")
    hook.install()
    cases: dict[str, dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    # DeepSpeed would compile its own all-reduce for CPUs.
    with without_cuda(), mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None):
        results = {name: run(case) for name, case in cases.items()}
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
