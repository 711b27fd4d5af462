"""Runs cases through verl's real estimator, worker, FSDP2 engine and ``ppo_loss`` on CPU, and records the gradients.

Run by ``test_equivalence.py`` as ``torchrun``-less processes, one a rank: ``python engine_harness.py CASES OUT`` with
RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Only verl's own code lies between the batch and the gradient; the
one thing replaced is the optimizer (plain SGD, so that a gradient's error is not amplified by Adam's division).
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROMPTS, RESPONSES_EACH, LONGEST = 4, 6, 9
VOCABULARY = 24


@dataclass(frozen=True)
class Case:
    """One way to divide and configure the same batch."""

    name: str
    adv_estimator: str = "ahpo"
    loss_mode: str = "ahpo"
    micro_batch_size: int | None = None
    """Rows of a micro-batch; None: dynamic batching by tokens."""
    max_tokens: int = 64
    mini_batches: int = 1
    epochs: int = 1
    permute: bool = False
    padding_rows: int = 0
    multi_turn: bool = False
    correction: bool = False
    """Rollout-correction weights."""
    per_token: bool = False
    """Advantages that differ between the tokens of a response."""
    rewards: str = "sparse"
    rejected: bool = False
    """Rollout correction has rejected every fifth response: V1 clears its ``response_mask``, not its ``loss_mask``."""
    masked_mini_batch: bool = False
    """No token of the second mini-batch is unmasked."""
    hpo: dict[str, float] = field(default_factory=dict)
    fault: str | None = None
    """``micro-batch``: take α from the micro-batch, as a naive implementation would. ``twice``: apply α twice."""


@dataclass
class Batch:
    """Padded tensors of a whole step: (N, T) but for ``rewards`` (N,), ``uid`` (N,) and ``prompts`` (list)."""

    prompts: list[torch.Tensor]
    responses: torch.Tensor
    lengths: torch.Tensor
    response_mask: torch.Tensor
    loss_mask: torch.Tensor
    """What verl counts the tokens of a mini-batch in."""
    old_log_probs: torch.Tensor
    rollout_is_weights: torch.Tensor
    rewards: torch.Tensor
    uid: np.ndarray
    tilt: torch.Tensor


def make_batch(case: Case) -> Batch:
    """The same 24 responses for every case; seeded, on every rank alike."""
    generator = torch.Generator().manual_seed(5)
    n = PROMPTS * RESPONSES_EACH

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    lengths = draw(1, LONGEST + 1, n)
    lengths[0] = LONGEST
    mask = torch.arange(LONGEST) < lengths.unsqueeze(1)
    turns = draw(0, 3, n, LONGEST) > 0
    turns[:, 0] = True
    # Prompt 0 is solved by one of six, prompt 1 by two, prompt 2 by all, prompt 3 by none: p̂⁺ = 3/24, p̂⁻ = 9/24.
    sparse = torch.tensor([1, 0, 0, 0, 0, 0] + [0, 1, 0, 0, 1, 0] + [1] * 6 + [0] * 6, dtype=torch.float32)
    # "noisy": the mean of six equal rewards of 0.9 or 0.3 is not 0.9 or 0.3 in fp32.
    rewards = sparse if case.rewards == "sparse" else torch.where(sparse > 0, 0.9, 0.3)
    mask = (mask & turns if case.multi_turn else mask).long()
    generated = mask
    if case.rejected:
        mask = mask * (torch.arange(n) % 5 != 0).long().unsqueeze(1)
    if case.masked_mini_batch:
        mask = mask * (torch.arange(n) % case.mini_batches != 1).long().unsqueeze(1)
        generated = mask
    batch = Batch(
        prompts=[draw(3, VOCABULARY, int(k)) for k in draw(2, 5, n)],
        responses=draw(3, VOCABULARY, n, LONGEST),
        lengths=lengths,
        response_mask=mask,
        loss_mask=generated,
        old_log_probs=-3.2 + 0.5 * torch.randn(n, LONGEST, generator=generator),
        rollout_is_weights=0.5 + torch.rand(n, LONGEST, generator=generator),
        rewards=rewards,
        uid=np.array([f"prompt-{i // RESPONSES_EACH}" for i in range(n)], dtype=object),
        tilt=torch.linspace(0.5, 1.5, LONGEST).expand(n, -1),
    )
    return batch


def add_padding(batch: Batch, rows: int) -> Batch:
    """Append rows as verl's ``upsample_batch_to_divisible_size`` does: one shared uid, an all-zero response mask."""
    if not rows:
        return batch
    out = copy.deepcopy(batch)
    out.prompts += [torch.tensor([3, 4])] * rows
    for name in ("responses", "response_mask", "loss_mask", "old_log_probs", "rollout_is_weights", "tilt"):
        value = getattr(batch, name)
        setattr(out, name, torch.cat([value, torch.zeros(rows, LONGEST, dtype=value.dtype)]))
    out.responses[-rows:, 0] = 3
    out.lengths = torch.cat([batch.lengths, torch.ones(rows, dtype=torch.long)])
    out.rewards = torch.cat([batch.rewards, torch.zeros(rows)])
    out.uid = np.concatenate([batch.uid, np.array(["pad0f3a"] * rows, dtype=object)])
    return out


def mini_batch_rows(case: Case, total: int) -> list[list[int]]:
    """Which rows make which mini-batch: real rows dealt in turn, then permuted inside; padding spread evenly."""
    real = PROMPTS * RESPONSES_EACH
    deal = [[i for i in range(real) if i % case.mini_batches == k] for k in range(case.mini_batches)]
    for i in range(real, total):
        deal[i % case.mini_batches].append(i)
    if case.permute:
        order = np.random.default_rng(3)
        deal = [list(order.permutation(rows)) for rows in deal]
    return deal


def compose(case: Case) -> Any:
    """The stock config of verl with plain overrides, through the plugin's own check."""
    return _compose(case.adv_estimator, case.loss_mode, tuple(sorted(case.hpo.items())))


@functools.cache
def _compose(adv_estimator: str, loss_mode: str, hpo: tuple[tuple[str, float], ...]) -> Any:
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    from hpo_plugin.verl import seams

    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=[
                f"algorithm.adv_estimator={adv_estimator}",
                f"actor_rollout_ref.actor.policy_loss.loss_mode={loss_mode}",
                "actor_rollout_ref.actor.strategy=fsdp2",
                "actor_rollout_ref.actor.fsdp_config.strategy=fsdp2",
                "actor_rollout_ref.actor.use_dynamic_bsz=True",
                f"actor_rollout_ref.rollout.n={RESPONSES_EACH}",
                *(f"+algorithm.hpo.{key}={value}" for key, value in hpo),
            ],
        )
    seams.prepare(config)
    return config


def advantages_of(case: Case, batch: Batch, config: Any) -> torch.Tensor:
    """Through verl's ``compute_advantage``, with the whole batch, as its trainer does."""
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    rewards = torch.zeros(len(batch.uid), LONGEST)
    rewards[torch.arange(len(batch.uid)), batch.lengths - 1] = batch.rewards
    data = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": batch.response_mask},
        non_tensors={"uid": batch.uid},
    )
    out = compute_advantage(data, adv_estimator=config.algorithm.adv_estimator, config=config.algorithm)
    advantages = out.batch["advantages"]
    return advantages * batch.tilt if case.per_token else advantages


def rank_share(case: Case, batch: Batch, advantages: torch.Tensor, rank: int, world: int) -> tuple[Any, int]:
    """This rank's rows as verl's workers get them: nested, mini-batch after mini-batch."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    deal = mini_batch_rows(case, len(batch.uid))
    rows = [row for mini_batch in deal for row in mini_batch[rank::world]]

    def nested(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    def unpadded(value: torch.Tensor) -> torch.Tensor:
        return nested([value[i, : batch.lengths[i]] for i in rows])

    sequences = [torch.cat([batch.prompts[i], batch.responses[i, : batch.lengths[i]]]) for i in rows]
    fields = {
        "input_ids": nested(sequences),
        "position_ids": nested([torch.arange(len(s)) for s in sequences]),
        "prompts": nested([batch.prompts[i] for i in rows]),
        "responses": unpadded(batch.responses),
        "response_mask": unpadded(batch.response_mask),
        "loss_mask": unpadded(batch.loss_mask),
        "old_log_probs": unpadded(batch.old_log_probs),
        "advantages": unpadded(advantages),
    }
    if case.correction:
        fields["rollout_is_weights"] = unpadded(batch.rollout_is_weights)
    data = TensorDict(fields, batch_size=len(rows))
    size = len(batch.uid) // case.mini_batches
    tu.assign_non_tensor_stack(data, "uid", [str(batch.uid[i]) for i in rows])
    tu.assign_non_tensor(
        data,
        temperature=1.0,
        calculate_entropy=False,
        global_batch_size=size,
        mini_batch_size=size,
        epochs=case.epochs,
        seed=42,
        dataloader_kwargs={"shuffle": False},
        use_dynamic_bsz=case.micro_batch_size is None,
        max_token_len_per_gpu=case.max_tokens,
        micro_batch_size_per_gpu=case.micro_batch_size,
    )
    return data, len(rows)


def build_model(path: Path) -> None:
    """A two-layer Qwen2 without a tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)


def build_worker(model_path: str, model: dict[str, Any] | None = None, engine: dict[str, Any] | None = None) -> Any:
    """Verl's own worker of the actor, on its FSDP2 engine; with other settings of the two configs."""
    import verl
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            **{
                "path": model_path,
                "load_tokenizer": False,
                "use_remove_padding": False,
                "enable_gradient_checkpointing": False,
                "external_lib": "cpu_engine_of_0_8"
                if verl.__version__.startswith("0.8.")
                else "hpo_plugin.cpu.backend",
                "override_config": {"attn_implementation": "sdpa"},
                **(model or {}),
            }
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            forward_only=False,
            model_dtype="fp32",
            dtype="float32",
            param_offload=False,
            optimizer_offload=False,
            use_torch_compile=False,
            use_dynamic_bsz=True,
            max_token_len_per_gpu=64,
            infer_max_token_len_per_gpu=64,
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            **(engine or {}),
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, clip_grad=1e9),
        checkpoint_config=None,
    )
    worker = TrainingWorker(config=config)
    worker.reset()
    return worker


def full(tensor: Any) -> torch.Tensor:
    """A sharded parameter or gradient, whole."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def inject(fault: str | None, alpha: float) -> Any:
    """Put a fault into the loss, to show that the equivalence test has the power to see it. Returns the undo."""
    from hpo_plugin import algorithm, fused

    original = fused.surrogate_loss
    if fault is None:
        return lambda: None

    def faulty(new: Any, old: Any, advantages: Any, mask: Any, **settings: Any) -> Any:
        signs = algorithm.response_signs(advantages, mask)
        wrong = alpha
        if fault == "micro-batch":
            counts = algorithm.count_signs(signs, mask.any(-1))
            wrong = float(algorithm.adaptive_alpha(counts, 0.1)) / alpha
        weights = algorithm.hysteretic_weights(signs, wrong).unsqueeze(-1)
        return original(new, old, advantages * weights, mask, **settings)

    fused.surrogate_loss = faulty
    return lambda: setattr(fused, "surrogate_loss", original)


def run_case(case: Case, worker: Any, start: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, Any]:
    """Gradients of every optimizer step, and the metrics of the step."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    from hpo_plugin.verl import metrics

    config = compose(case)
    batch = add_padding(make_batch(case), case.padding_rows)
    advantages = advantages_of(case, batch, config)
    driver = metrics.drain()
    data, _ = rank_share(case, batch, advantages, rank, world)

    engine = worker.engine
    parameters = dict(engine.module.named_parameters())
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(start[name])
    engine.optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    gradients: list[dict[str, torch.Tensor]] = []

    def optimizer_step() -> float:
        gradients.append({name: full(value.grad) for name, value in parameters.items()})
        engine.optimizer.step()
        return 0.0

    engine.optimizer_step = optimizer_step
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    calls = []

    def counted_ppo_loss(**kwargs: Any) -> Any:
        calls.append(None)
        return ppo_loss(**kwargs)

    worker.set_loss_fn(functools.partial(counted_ppo_loss, config=actor))
    undo = inject(case.fault, driver["actor/hpo/alpha"])
    try:
        output = worker.train_mini_batch(data)
    finally:
        undo()
    return {
        "gradients": gradients,
        "driver": driver,
        "metrics": tu.get(output, "metrics"),
        "advantages": advantages,
        "micro_batches": len(calls),
    }


def leave(out: Path) -> None:
    """Leave the process group once every rank has its results.

    A rank that closes its sockets while another one still reads from them resets the connection.
    """
    store = torch.distributed.FileStore(str(out.with_suffix(".left")), torch.distributed.get_world_size())
    store.set(str(torch.distributed.get_rank()), "")
    store.wait([str(rank) for rank in range(torch.distributed.get_world_size())])
    torch.distributed.destroy_process_group()


def main() -> None:
    """Run every case of a pickle and write rank 0's results."""
    cases_path, out_path = sys.argv[1:]
    cases: list[Case] = pickle.loads(Path(cases_path).read_bytes())
    torch.set_num_threads(1)
    os.environ["WG_BACKEND"] = "ray"  # what verl's worker group sets: makes the backend create the gloo group
    import verl  # noqa: F401

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model_path = Path(out_path).parent / f"model-{world}-{rank}"
    build_model(model_path)
    worker = build_worker(str(model_path))
    start = {name: value.detach().clone() for name, value in worker.engine.module.named_parameters()}
    results = {case.name: run_case(case, worker, start, rank, world) for case in cases}
    if rank == 0:
        Path(out_path).write_bytes(pickle.dumps(results))
    leave(Path(out_path))


if __name__ == "__main__":
    main()
