"""How a recipe's batch and model are sharded over GPUs, and whether they can be.

verl finds most of this out in a worker, after models are loaded or after the first rollout. Here it is found when the
config is read. This module imports OmegaConf only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpo_plugin.errors import ConfigError

__all__ = ["KEY_RECIPE", "STRATEGIES", "Layout", "check_layout", "check_sharding"]

#: The node that configs composed from ``hpo_recipe`` have; only such configs are checked here.
KEY_RECIPE = "recipe"

_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"


def _fsdp(actor: DictConfig) -> tuple[int, int, int]:
    # verl still reads the older of the two keys.
    return 1, 1, max(actor.ulysses_sequence_parallel_size, actor.fsdp_config.ulysses_sequence_parallel_size)


def _megatron(actor: DictConfig) -> tuple[int, int, int]:
    sizes = actor.megatron
    return sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size, sizes.context_parallel_size


def _veomni(actor: DictConfig) -> tuple[int, int, int]:
    return 1, 1, actor.veomni.ulysses_parallel_size


def _torchtitan(actor: DictConfig) -> tuple[int, int, int]:
    sizes = actor.torchtitan
    return sizes.tensor_parallel_size, sizes.pipeline_parallel_size, sizes.context_parallel_size


#: ``actor_rollout_ref.actor.strategy`` -> tensor, pipeline and context parallel sizes from the actor's config.
#: MindSpeed is verl's ``megatron`` on an NPU; verl has no actor config for Automodel.
STRATEGIES: dict[str, Callable[[DictConfig], tuple[int, int, int]]] = {
    "fsdp2": _fsdp,
    "fsdp": _fsdp,
    "megatron": _megatron,
    "veomni": _veomni,
    "torchtitan": _torchtitan,
}


@dataclass(frozen=True)
class Layout:
    """Sizes of a run: GPUs, how the trainer and the rollout shard the model, rows.

    Attributes:
        strategy: ``actor_rollout_ref.actor.strategy``.
        nodes: Number of nodes.
        gpus_per_node: GPUs of a node.
        tensor: Tensor-parallel size of the actor; 1 for FSDP and VeOmni.
        pipeline: Pipeline-parallel size of the actor; 1 for FSDP and VeOmni.
        context: GPUs that share a row: context parallel for Megatron and TorchTitan, Ulysses for FSDP and VeOmni.
        rollout_tensor: Tensor-parallel size of the rollout.
        prompts: Prompts of a step.
        mini_batch_prompts: Prompts of an optimizer step.
        responses: Responses per prompt.
        prompt_tokens: Largest number of prompt tokens.
        response_tokens: Largest number of response tokens.
        tokens_per_gpu: Largest number of tokens in a micro-batch of one GPU.
    """

    strategy: str
    nodes: int
    gpus_per_node: int
    tensor: int
    pipeline: int
    context: int
    rollout_tensor: int
    prompts: int
    mini_batch_prompts: int
    responses: int
    prompt_tokens: int
    response_tokens: int
    tokens_per_gpu: int

    @classmethod
    def of(cls, config: DictConfig) -> Layout:
        """Read a composed config.

        Raises:
            ConfigError: if the actor's strategy is none of :data:`STRATEGIES`.
        """
        actor, rollout = OmegaConf.select(config, _ACTOR), OmegaConf.select(config, _ROLLOUT)
        if actor.strategy not in STRATEGIES:
            raise ConfigError(f"{_ACTOR}.strategy={actor.strategy} is none of {', '.join(STRATEGIES)}.")
        tensor, pipeline, context = STRATEGIES[actor.strategy](actor)
        return cls(
            strategy=actor.strategy,
            nodes=config.trainer.nnodes,
            gpus_per_node=config.trainer.n_gpus_per_node,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            rollout_tensor=rollout.tensor_model_parallel_size,
            prompts=config.data.train_batch_size,
            mini_batch_prompts=actor.ppo_mini_batch_size,
            responses=rollout.n,
            prompt_tokens=config.data.max_prompt_length,
            response_tokens=config.data.max_response_length,
            tokens_per_gpu=actor.ppo_max_token_len_per_gpu,
        )

    @property
    def gpus(self) -> int:
        """Of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def model_parallel(self) -> int:
        """GPUs that one row passes through."""
        return self.tensor * self.pipeline * self.context

    @property
    def ranks(self) -> int:
        """Data-parallel ranks of the trainer."""
        return self.gpus // self.model_parallel

    @property
    def replicas(self) -> int:
        """Copies of the model that generate."""
        return self.gpus // self.rollout_tensor

    @property
    def mini_batch_rows(self) -> int:
        """Responses of an optimizer step."""
        return self.mini_batch_prompts * self.responses

    @property
    def rows_of_rank(self) -> int:
        """Responses of an optimizer step on one data-parallel rank."""
        return self.mini_batch_rows // self.ranks

    @property
    def row_tokens(self) -> int:
        """Of the longest row: prompt and response."""
        return self.prompt_tokens + self.response_tokens


def check_layout(config: DictConfig) -> Layout | None:
    """Refuse a recipe whose batch or model cannot be sharded as it says.

    Args:
        config: the root config. Without ``recipe.architecture``, or with an engine that is not in
            :data:`STRATEGIES`, nothing is checked: another's config is verl's to judge.

    Returns:
        The layout; None where nothing was checked.

    Raises:
        ConfigError: each message names the keys, their values and what to do.
    """
    architecture = OmegaConf.select(config, f"{KEY_RECIPE}.architecture")
    # An engine that somebody added to verl is theirs to judge.
    if architecture is None or OmegaConf.select(config, f"{_ACTOR}.strategy") not in STRATEGIES:
        return None
    layout = Layout.of(config)
    check_sharding(layout, architecture)
    if layout.strategy == "torchtitan":
        _check_torchtitan(layout, OmegaConf.select(config, f"{_ACTOR}.torchtitan"))
    return layout


def check_sharding(layout: Layout, architecture: Any) -> None:
    """Refuse a layout that does not fit itself or its model.

    Args:
        layout: the sizes.
        architecture: has ``heads``, ``kv_heads`` and ``layers``: the node ``recipe.architecture``, or what it becomes.

    Raises:
        ConfigError: see :func:`check_layout`.
    """
    _check_gpus(layout)
    _check_batch(layout)
    _check_model(layout, architecture)


def _gpus(layout: Layout) -> str:
    return (
        f"trainer.nnodes={layout.nodes} x trainer.n_gpus_per_node={layout.gpus_per_node} (hpo/cluster) "
        f"are {layout.gpus} GPUs"
    )


def _check_gpus(layout: Layout) -> None:
    if layout.gpus % layout.model_parallel:
        raise ConfigError(
            f"{_gpus(layout)}, which {_ACTOR} cannot divide into groups of {layout.model_parallel} (tensor "
            f"{layout.tensor} x pipeline {layout.pipeline} x context {layout.context}). Take a multiple of "
            f"{layout.model_parallel} GPUs, or smaller parallel sizes."
        )
    if layout.gpus_per_node % layout.rollout_tensor:
        raise ConfigError(
            f"trainer.n_gpus_per_node={layout.gpus_per_node} cannot be divided into rollout replicas of "
            f"{_ROLLOUT}.tensor_model_parallel_size={layout.rollout_tensor} GPUs. Take a size that divides it."
        )


def _check_torchtitan(layout: Layout, sizes: DictConfig) -> None:
    """TorchTitan takes its data-parallel sizes from the config, where the other engines compute them."""
    replicas, shards = sizes.data_parallel_replicate_size, sizes.data_parallel_shard_size
    if replicas * shards != layout.ranks:
        raise ConfigError(
            f"{_gpus(layout)}, and groups of {layout.model_parallel} share a row, but {_ACTOR}.torchtitan has "
            f"data_parallel_replicate_size={replicas} x data_parallel_shard_size={shards}. Set the two so that their "
            f"product is {layout.ranks}."
        )
    # TorchTitan's own default (verl/trainer/config/engine/torchtitan.yaml).
    positions = sizes.max_seq_len or 2048
    if layout.row_tokens > positions:
        raise ConfigError(
            f"data.max_prompt_length={layout.prompt_tokens} + data.max_response_length={layout.response_tokens} exceed "
            f"{_ACTOR}.torchtitan.max_seq_len={positions}. Set it to {layout.row_tokens} or more."
        )


def _check_batch(layout: Layout) -> None:
    batch = f"data.train_batch_size={layout.prompts}"
    mini_batch = f"{_ACTOR}.ppo_mini_batch_size={layout.mini_batch_prompts}"
    if layout.prompts % layout.mini_batch_prompts or layout.prompts < 2 * layout.mini_batch_prompts:
        raise ConfigError(
            f"{batch} is not two or more times {mini_batch}. With one mini-batch a step, ratios are 1 and most "
            f"algorithms coincide; what is left over, verl fills with empty rows. Set {_ACTOR}.ppo_mini_batch_size to "
            f"{layout.prompts // 2}, or another divisor."
        )
    if layout.mini_batch_rows % layout.ranks:
        raise ConfigError(
            f"{_gpus(layout)} and {layout.ranks} data-parallel ranks, among which a mini-batch of {mini_batch} x "
            f"{_ROLLOUT}.n={layout.responses} = {layout.mini_batch_rows} rows cannot be divided. Take fewer GPUs "
            f"(ranks that divide {layout.mini_batch_rows}), or a larger mini-batch together with {batch}."
        )
    if layout.row_tokens > layout.tokens_per_gpu * layout.context:
        raise ConfigError(
            f"data.max_prompt_length={layout.prompt_tokens} + data.max_response_length={layout.response_tokens} exceed "
            f"{_ACTOR}.ppo_max_token_len_per_gpu={layout.tokens_per_gpu} x {layout.context} GPUs that share a row. "
            f"Set {_ACTOR}.ppo_max_token_len_per_gpu to {-(-layout.row_tokens // layout.context)} or more."
        )


_ULYSSES = {
    "fsdp": f"{_ACTOR}.ulysses_sequence_parallel_size",
    "fsdp2": f"{_ACTOR}.ulysses_sequence_parallel_size",
    "veomni": f"{_ACTOR}.veomni.ulysses_parallel_size",
}


def _size(layout: Layout, kind: str, *, to_set: bool = False) -> str:
    """The config key of a parallel size; ``hpo/model`` sets Megatron's under ``recipe``."""
    if layout.strategy == "torchtitan":
        return f"{_ACTOR}.torchtitan.{kind}_parallel_size"
    return f"{'recipe' if to_set else _ACTOR}.megatron.{kind}_model_parallel_size"


def _check_model(layout: Layout, architecture: Any) -> None:
    heads, kv_heads, layers = architecture.heads, architecture.kv_heads, architecture.layers
    shape = f"a model of {heads} attention heads, {kv_heads} key-value heads and {layers} layers (hpo/model)"
    size = layout.rollout_tensor
    # vLLM and SGLang copy key-value heads where there are fewer than GPUs.
    if heads % size or (kv_heads % size and size % kv_heads):
        raise ConfigError(
            f"{_ROLLOUT}.tensor_model_parallel_size={size} does not divide {shape}. Take a divisor of {kv_heads}."
        )
    # Ulysses exchanges heads; verl repeats key-value heads where there are fewer.
    if layout.strategy in ("fsdp", "fsdp2", "veomni") and heads % layout.context:
        raise ConfigError(
            f"{_ULYSSES[layout.strategy]}={layout.context} does not divide {shape}. Take a divisor of {heads}."
        )
    if heads % layout.tensor or kv_heads % layout.tensor:
        raise ConfigError(
            f"{_size(layout, 'tensor')}={layout.tensor} does not divide {shape}. "
            f"Set {_size(layout, 'tensor', to_set=True)} to a divisor of {kv_heads}."
        )
    if layers % layout.pipeline:
        raise ConfigError(
            f"{_size(layout, 'pipeline')}={layout.pipeline} does not divide {shape}. "
            f"Set {_size(layout, 'pipeline', to_set=True)} to a divisor of {layers}."
        )
