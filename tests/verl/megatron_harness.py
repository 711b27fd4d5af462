"""Runs cases of ``engine_harness.py`` through verl's Megatron engine on CPU, and records the gradients.

Run by ``test_megatron.py`` as processes, one a rank: ``megatron_harness.main()`` with the arguments JOB OUT, and RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. A gradient is what one step of plain SGD took away from the weights, which
mbridge gathers from all ranks and names as Hugging Face does.
"""

from __future__ import annotations

import functools
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import engine_harness as harness
import torch

LEARNING_RATE = 0.5


def build_model(path: Path, *, experts: bool) -> None:
    """A four-layer Qwen2, or a two-layer Qwen3-MoE with four experts, whose biases and norms differ from each other."""
    from safetensors.torch import load_file, save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": harness.VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    if experts:
        moe = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        config = Qwen3MoeConfig(num_hidden_layers=2, head_dim=8, decoder_sparse_step=1, **moe, **sizes)
        Qwen3MoeForCausalLM(config).save_pretrained(path)
        return
    Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=4, **sizes)).save_pretrained(path)
    file = path / "model.safetensors"
    state = load_file(file)
    generator = torch.Generator().manual_seed(1)
    for name, value in state.items():
        if name.endswith("bias") or "norm" in name:
            state[name] = ("norm" in name) + 0.1 * torch.randn(value.shape, generator=generator)
    save_file(state, file, metadata={"format": "pt"})


def build_worker(path: Path, layout: dict[str, Any]) -> Any:
    """Verl's own worker of the actor, on its Megatron engine."""
    import megatron_on_cpu

    import hpo_plugin.cpu.backend  # noqa: F401

    megatron_on_cpu.install()
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    plain = {
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "attention_softmax_in_fp32": True,
        "masked_softmax_fusion": False,
    }
    engine = McoreEngineConfig(
        strategy="megatron",
        forward_only=False,
        vanilla_mbridge=True,
        use_mbridge=True,
        use_distributed_optimizer=False,
        param_offload=False,
        optimizer_offload=False,
        use_dynamic_bsz=True,
        max_token_len_per_gpu=64,
        infer_max_token_len_per_gpu=64,
        dtype="bfloat16",
        override_transformer_config=plain | layout.get("override_transformer_config", {}),
        **{key: value for key, value in layout.items() if key != "override_transformer_config"},
    )
    # verl admits half precision only, where rounding would hide an error.
    object.__setattr__(engine, "dtype", "float32")
    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=str(path), load_tokenizer=False, use_remove_padding=True, external_lib="hpo_plugin.cpu.backend"
        ),
        engine_config=engine,
        optimizer_config=McoreOptimizerConfig(
            optimizer="sgd",
            lr=LEARNING_RATE,
            clip_grad=1e9,
            weight_decay=0.0,
            lr_decay_style="constant",
            total_training_steps=100,
            override_optimizer_config={"sgd_momentum": 0.0},
        ),
        checkpoint_config=None,
    )
    object.__setattr__(config.model_config, "tokenizer", types.SimpleNamespace(pad_token_id=0))
    worker = TrainingWorker(config=config)
    worker.reset()
    return worker


@torch.no_grad()
def weights(engine: Any) -> dict[str, torch.Tensor]:
    """All weights, whole, by their names in Hugging Face's model."""
    return {name: value.detach().float().clone() for name, value in engine.bridge.export_weights(engine.module)}


def run_case(case: harness.Case, worker: Any, path: Path) -> dict[str, Any]:
    """Gradients of every optimizer step, the loss's metrics, and where this rank stands."""
    from megatron.core import parallel_state
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    from hpo_plugin.verl import metrics

    engine = worker.engine
    config = harness.compose(case)
    batch = harness.add_padding(harness.make_batch(case), case.padding_rows)
    advantages = harness.advantages_of(case, batch, config)
    alpha = metrics.drain()["actor/hpo/alpha"]
    dp_rank, dp_size = engine.get_data_parallel_rank(), engine.get_data_parallel_size()
    data, _ = harness.rank_share(case, batch, advantages, dp_rank, dp_size)
    engine.bridge.load_weights(engine.module, str(path))
    engine.optimizer.reload_model_params()
    gradients: list[dict[str, torch.Tensor]] = []

    def optimizer_step() -> Any:
        before = weights(engine)
        norm = type(engine).optimizer_step(engine)
        after = weights(engine)
        gradients.append({name: (before[name] - after[name]) / LEARNING_RATE for name in after})
        return norm

    engine.optimizer_step = optimizer_step
    rows: list[int] = []

    def counted_ppo_loss(**kwargs: Any) -> Any:
        rows.append(len(kwargs["data"]))
        return ppo_loss(**kwargs)

    worker.set_loss_fn(
        functools.partial(counted_ppo_loss, config=omega_conf_to_dataclass(config.actor_rollout_ref.actor))
    )
    undo = harness.inject(case.fault, alpha)
    try:
        output = worker.train_mini_batch(data)
    finally:
        undo()
    return {
        "gradients": gradients,
        "metrics": None if output is None else tu.get(output, "metrics"),
        "rows_in_loss": sum(rows),
        "dp_rank": dp_rank,
        "dp_size": dp_size,
        "is_last_stage": parallel_state.is_pipeline_last_stage(ignore_virtual=True),
    }


def main() -> None:
    """Run every case of a job and write this rank's results."""
    job, out = pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
    torch.set_num_threads(1)
    os.environ["WG_BACKEND"] = "ray"  # what verl's worker group sets: makes the backend create the gloo group
    import verl  # noqa: F401

    rank = int(os.environ["RANK"])
    path = out.parent / f"model-{rank}"
    build_model(path, experts=job["experts"])
    worker = build_worker(path, job["layout"])
    results = {case.name: run_case(case, worker, path) for case in job["cases"]}
    out.with_suffix(f".{rank}").write_bytes(pickle.dumps(results))
    harness.leave(out)
