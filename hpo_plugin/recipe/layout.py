"""The sizes of a recipe over GPUs, and checks that its batch and model can be sharded.

verl detects most of these errors in a worker, after it has loaded models or after the first rollout. This module
detects them when it reads the config. It imports only OmegaConf.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpo_plugin.errors import ConfigError

__all__ = ["KEY_RECIPE", "STRATEGIES", "Layout", "check_layout", "check_sharding", "check_sizes"]

#: The node of configs that are composed from ``hpo_recipe``.
KEY_RECIPE = "recipe"

_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"
#: The keys of a recipe.
_KEYS = ("architecture", "data_dir", "engine", "megatron", "model", "offload", "task")
#: The sizes that every config of verl has, in the order of the fields of :class:`Layout`.
_COUNTS = (
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "data.train_batch_size",
    f"{_ACTOR}.ppo_mini_batch_size",
    f"{_ROLLOUT}.n",
    f"{_ROLLOUT}.tensor_model_parallel_size",
)


def _count(config: DictConfig, key: str, prefix: str = f"{_ACTOR}.") -> int:
    value = OmegaConf.select(config, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        key = f"{prefix}{key}"
        raise ConfigError(f"{key}={value!r} is not a positive integer. Set {key} to an integer of 1 or more.")
    return value


def _fsdp(actor: DictConfig) -> tuple[int, int, int]:
    # verl still reads the older of the two keys.
    key = "ulysses_sequence_parallel_size"
    return 1, 1, max(_count(actor, key), _count(actor, f"fsdp_config.{key}"))


def _megatron(actor: DictConfig) -> tuple[int, int, int]:
    tensor, pipeline, context = (
        _count(actor, f"megatron.{kind}_parallel_size") for kind in ("tensor_model", "pipeline_model", "context")
    )
    return tensor, pipeline, context


def _veomni(actor: DictConfig) -> tuple[int, int, int]:
    return 1, 1, _count(actor, "veomni.ulysses_parallel_size")


def _torchtitan(actor: DictConfig) -> tuple[int, int, int]:
    tensor, pipeline, context = (
        _count(actor, f"torchtitan.{kind}_parallel_size") for kind in ("tensor", "pipeline", "context")
    )
    return tensor, pipeline, context


#: ``actor_rollout_ref.actor.strategy`` -> function that reads the tensor, pipeline and context parallel sizes from the
#: actor's config. MindSpeed is verl's ``megatron`` on an NPU; verl has no actor config for Automodel.
STRATEGIES: dict[str, Callable[[DictConfig], tuple[int, int, int]]] = {
    "fsdp2": _fsdp,
    "fsdp": _fsdp,
    "megatron": _megatron,
    "veomni": _veomni,
    "torchtitan": _torchtitan,
}


@dataclass(frozen=True)
class Layout:
    """Sizes of a run: GPUs, parallel sizes of the trainer and the rollout, batch, tokens.

    Attributes:
        strategy: ``actor_rollout_ref.actor.strategy``.
        nodes: Number of nodes.
        gpus_per_node: GPUs per node.
        tensor: Tensor-parallel size of the actor; 1 for FSDP and VeOmni.
        pipeline: Pipeline-parallel size of the actor; 1 for FSDP and VeOmni.
        context: GPUs that share a row: context parallel for Megatron and TorchTitan, Ulysses for FSDP and VeOmni.
        rollout_tensor: Tensor-parallel size of the rollout.
        prompts: Prompts of a step.
        mini_batch_prompts: Prompts of an optimizer step.
        responses: Responses per prompt.
        prompt_tokens: Maximum number of prompt tokens.
        response_tokens: Maximum number of response tokens.
        tokens_per_gpu: Maximum number of tokens in a micro-batch of one GPU.
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
            ConfigError: if the actor's strategy is not one of :data:`STRATEGIES`, or a size is not a positive integer.
        """
        actor = OmegaConf.select(config, _ACTOR)
        if actor.strategy not in STRATEGIES:
            raise ConfigError(
                f"{_ACTOR}.strategy={actor.strategy} is not supported. Set one of {', '.join(STRATEGIES)}."
            )
        tensor, pipeline, context = STRATEGIES[actor.strategy](actor)
        nodes, gpus_per_node, prompts, mini_batch_prompts, responses, rollout_tensor = (
            _count(config, key, prefix="") for key in _COUNTS
        )
        return cls(
            strategy=actor.strategy,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            rollout_tensor=rollout_tensor,
            prompts=prompts,
            mini_batch_prompts=mini_batch_prompts,
            responses=responses,
            prompt_tokens=config.data.max_prompt_length,
            response_tokens=config.data.max_response_length,
            tokens_per_gpu=actor.ppo_max_token_len_per_gpu,
        )

    @property
    def gpus(self) -> int:
        """Number of GPUs on all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def model_parallel(self) -> int:
        """Number of GPUs that process one row together."""
        return self.tensor * self.pipeline * self.context

    @property
    def ranks(self) -> int:
        """Number of data-parallel ranks of the trainer."""
        return self.gpus // self.model_parallel

    @property
    def replicas(self) -> int:
        """Number of rollout replicas of the model."""
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
        """Number of tokens of the longest row, prompt and response."""
        return self.prompt_tokens + self.response_tokens


def check_layout(config: DictConfig) -> Layout | None:
    """Check that the batch and the model of a recipe can be sharded with its sizes.

    Args:
        config: the root config. Without ``recipe.architecture``, or with an engine that is not in
            :data:`STRATEGIES`, the function checks nothing and leaves the checks to verl.

    Returns:
        The layout; None if nothing was checked.

    Raises:
        ConfigError: each message names the keys, their values and what to do.
    """
    architecture = OmegaConf.select(config, f"{KEY_RECIPE}.architecture")
    if architecture is None:
        return None
    _check_keys(config[KEY_RECIPE])
    # Engines that a user has added to verl are not checked.
    if OmegaConf.select(config, f"{_ACTOR}.strategy") not in STRATEGIES:
        return None
    layout = Layout.of(config)
    check_sharding(layout, architecture)
    if layout.strategy == "torchtitan":
        _check_torchtitan(layout, OmegaConf.select(config, f"{_ACTOR}.torchtitan"))
    return layout


def _check_keys(recipe: DictConfig) -> None:
    """Reject keys that no recipe reads, but that resemble one that a recipe reads."""
    for key in map(str, recipe):
        if key not in _KEYS and (close := difflib.get_close_matches(key, _KEYS, 1)):
            raise ConfigError(
                f"{KEY_RECIPE}.{key}={recipe[key]} has no effect. Set {KEY_RECIPE}.{close[0]}, or remove it."
            )
    if not isinstance(recipe.get("offload", False), bool):
        raise ConfigError(
            f"{KEY_RECIPE}.offload={recipe.offload!r} is not a boolean. Set {KEY_RECIPE}.offload=true or false."
        )


def check_sizes(config: DictConfig) -> None:
    """Check the sizes of any run whose trainer and rollout share GPUs, with or without a recipe.

    verl detects an indivisible mini-batch only after the first rollout.

    Args:
        config: the root config. If one of the keys is missing, the sizes are not compared. Engines that are not in
            :data:`STRATEGIES` are not checked.

    Raises:
        ConfigError: each message names the keys, their values and what to do.
    """
    absent = object()
    if any(OmegaConf.select(config, key, default=absent) is absent for key in _COUNTS):
        return
    if OmegaConf.select(config, f"{_ACTOR}.strategy") not in STRATEGIES:
        return
    layout = Layout.of(config)
    _check_groups(layout)
    size = layout.rollout_tensor
    for key in ("data_parallel_size", "pipeline_model_parallel_size"):
        size *= OmegaConf.select(config, f"{_ROLLOUT}.{key}") or 1
    if layout.gpus % size:
        raise ConfigError(
            f"{_gpus(layout)} cannot be divided into rollout replicas of {size} GPUs "
            f"({_ROLLOUT}.tensor_model_parallel_size={layout.rollout_tensor}). Set a size that divides {layout.gpus}."
        )
    if layout.prompts < layout.mini_batch_prompts:
        raise ConfigError(
            f"data.train_batch_size={layout.prompts} is smaller than {_ACTOR}.ppo_mini_batch_size="
            f"{layout.mini_batch_prompts}. Set {_ACTOR}.ppo_mini_batch_size to {layout.prompts} or less."
        )
    _check_rows(layout)


def check_sharding(layout: Layout, architecture: Any) -> None:
    """Check that the sizes of a layout are consistent and fit the model.

    Args:
        layout: the sizes.
        architecture: an object with ``heads``, ``kv_heads`` and ``layers``: the node ``recipe.architecture``, or an
            ``Architecture``.

    Raises:
        ConfigError: see :func:`check_layout`.
    """
    _check_gpus(layout)
    _check_batch(layout)
    _check_model(layout, architecture)


def _gpus(layout: Layout) -> str:
    return (
        f"trainer.nnodes={layout.nodes} x trainer.n_gpus_per_node={layout.gpus_per_node} = {layout.gpus} GPUs "
        "(hpo/cluster)"
    )


def _check_groups(layout: Layout) -> None:
    if layout.gpus % layout.model_parallel:
        raise ConfigError(
            f"{_gpus(layout)} cannot be divided into model-parallel groups of {layout.model_parallel} GPUs (sizes of "
            f"{_ACTOR}: tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context}). Use a "
            f"multiple of {layout.model_parallel} GPUs, or smaller parallel sizes."
        )


def _check_gpus(layout: Layout) -> None:
    _check_groups(layout)
    if layout.gpus_per_node % layout.rollout_tensor:
        raise ConfigError(
            f"trainer.n_gpus_per_node={layout.gpus_per_node} cannot be divided into rollout replicas of "
            f"{_ROLLOUT}.tensor_model_parallel_size={layout.rollout_tensor} GPUs. Set a size that divides "
            f"{layout.gpus_per_node}."
        )


def _check_torchtitan(layout: Layout, sizes: DictConfig) -> None:
    """Check the data-parallel sizes of TorchTitan, which it reads from the config; other engines compute them."""
    replicas, shards = sizes.data_parallel_replicate_size, sizes.data_parallel_shard_size
    if replicas * shards != layout.ranks:
        raise ConfigError(
            f"{_ACTOR}.torchtitan.data_parallel_replicate_size={replicas} x data_parallel_shard_size={shards} is not "
            f"the number of data-parallel ranks: {_gpus(layout)} in model-parallel groups of {layout.model_parallel} "
            f"are {layout.ranks} ranks. Set the two sizes so that their product is {layout.ranks}."
        )
    # TorchTitan's own default (verl/trainer/config/engine/torchtitan.yaml).
    positions = sizes.max_seq_len or 2048
    if layout.row_tokens > positions:
        raise ConfigError(
            f"data.max_prompt_length={layout.prompt_tokens} + data.max_response_length={layout.response_tokens} exceed "
            f"{_ACTOR}.torchtitan.max_seq_len={positions}. Set max_seq_len to {layout.row_tokens} or more."
        )


def _check_rows(layout: Layout) -> None:
    if layout.mini_batch_rows % layout.ranks:
        raise ConfigError(
            f"{_gpus(layout)} give {layout.ranks} data-parallel ranks, which do not divide the mini-batch of "
            f"{_ACTOR}.ppo_mini_batch_size={layout.mini_batch_prompts} x {_ROLLOUT}.n={layout.responses} = "
            f"{layout.mini_batch_rows} rows. Use fewer GPUs, so that the number of ranks divides "
            f"{layout.mini_batch_rows}, or increase both {_ACTOR}.ppo_mini_batch_size and "
            f"data.train_batch_size={layout.prompts}."
        )


def _check_batch(layout: Layout) -> None:
    batch = f"data.train_batch_size={layout.prompts}"
    mini_batch = f"{_ACTOR}.ppo_mini_batch_size={layout.mini_batch_prompts}"
    if layout.prompts % layout.mini_batch_prompts or layout.prompts < 2 * layout.mini_batch_prompts:
        raise ConfigError(
            f"{batch} must be a multiple of {mini_batch}, and at least twice as large. With one mini-batch per step, "
            "ratios are 1 and most algorithms are the same; verl fills an incomplete mini-batch with empty rows. Set "
            f"{_ACTOR}.ppo_mini_batch_size to {layout.prompts // 2}, or to a smaller divisor of {layout.prompts}."
        )
    _check_rows(layout)
    if layout.row_tokens > layout.tokens_per_gpu * layout.context:
        raise ConfigError(
            f"data.max_prompt_length={layout.prompt_tokens} + data.max_response_length={layout.response_tokens} exceed "
            f"{_ACTOR}.ppo_max_token_len_per_gpu={layout.tokens_per_gpu} x {layout.context} (GPUs that share a row). "
            f"Set {_ACTOR}.ppo_max_token_len_per_gpu to {-(-layout.row_tokens // layout.context)} or more."
        )


_ULYSSES = {
    "fsdp": f"{_ACTOR}.ulysses_sequence_parallel_size",
    "fsdp2": f"{_ACTOR}.ulysses_sequence_parallel_size",
    "veomni": f"{_ACTOR}.veomni.ulysses_parallel_size",
}


def _size(layout: Layout, kind: str, *, to_set: bool = False) -> str:
    """The config key of a parallel size. ``hpo/model`` sets the keys of Megatron under ``recipe``."""
    if layout.strategy == "torchtitan":
        return f"{_ACTOR}.torchtitan.{kind}_parallel_size"
    return f"{'recipe' if to_set else _ACTOR}.megatron.{kind}_model_parallel_size"


def _check_model(layout: Layout, architecture: Any) -> None:
    heads, kv_heads, layers = architecture.heads, architecture.kv_heads, architecture.layers
    shape = f"a model with {heads} attention heads, {kv_heads} key-value heads and {layers} layers (hpo/model)"
    size = layout.rollout_tensor
    # vLLM and SGLang copy key-value heads if there are fewer heads than GPUs.
    if heads % size or (kv_heads % size and size % kv_heads):
        raise ConfigError(
            f"{_ROLLOUT}.tensor_model_parallel_size={size} cannot shard {shape}. Set a divisor of {kv_heads}."
        )
    # Ulysses exchanges heads; verl repeats key-value heads if there are fewer heads than GPUs.
    if layout.strategy in ("fsdp", "fsdp2", "veomni") and heads % layout.context:
        raise ConfigError(
            f"{_ULYSSES[layout.strategy]}={layout.context} cannot shard {shape}. Set a divisor of {heads}."
        )
    if heads % layout.tensor or kv_heads % layout.tensor:
        raise ConfigError(
            f"{_size(layout, 'tensor')}={layout.tensor} cannot shard {shape}. "
            f"Set {_size(layout, 'tensor', to_set=True)} to a divisor of {kv_heads}."
        )
    if layers % layout.pipeline:
        raise ConfigError(
            f"{_size(layout, 'pipeline')}={layout.pipeline} cannot shard {shape}. "
            f"Set {_size(layout, 'pipeline', to_set=True)} to a divisor of {layers}."
        )
