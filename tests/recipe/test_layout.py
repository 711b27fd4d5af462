"""What is refused before Ray starts, with the keys and values that cause it; each line worked out by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from hpo_plugin.errors import ConfigError
from hpo_plugin.recipe.layout import Layout, check_layout, check_sharding

#: Qwen2.5-1.5B on one node: 16 prompts of 8 responses, two mini-batches of 64 rows.
LAYOUT = Layout(
    strategy="fsdp2",
    nodes=1,
    gpus_per_node=8,
    tensor=1,
    pipeline=1,
    context=1,
    rollout_tensor=1,
    prompts=16,
    mini_batch_prompts=8,
    responses=8,
    prompt_tokens=4096,
    response_tokens=2048,
    tokens_per_gpu=16384,
)
ARCHITECTURE = SimpleNamespace(heads=12, kv_heads=2, layers=28)


def refused(layout: Layout) -> str:
    with pytest.raises(ConfigError) as caught:
        check_sharding(layout, ARCHITECTURE)
    return str(caught.value)


def test_ranks_rows_and_replicas_are_counted():
    """16 GPUs, groups of 2 x 1 x 2: 4 ranks, 64 / 4 rows each; vLLM on pairs: 8 replicas; 4,096 + 2,048 tokens."""
    layout = replace(LAYOUT, nodes=2, tensor=2, context=2, rollout_tensor=2)
    check_sharding(layout, ARCHITECTURE)
    assert (layout.gpus, layout.model_parallel, layout.ranks, layout.rows_of_rank) == (16, 4, 4, 16)
    assert (layout.replicas, layout.mini_batch_rows, layout.row_tokens) == (8, 64, 6144)


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_as_many_ranks_as_rows_are_accepted(nodes):
    check_sharding(replace(LAYOUT, nodes=nodes), ARCHITECTURE)


@pytest.mark.parametrize("nodes", [3, 16, 64])
def test_rows_that_ranks_cannot_share_are_refused_naming_cluster_and_batch(nodes):
    """64 rows over 24, 128 or 512 ranks."""
    said = refused(replace(LAYOUT, nodes=nodes))
    assert f"trainer.nnodes={nodes} x trainer.n_gpus_per_node=8 = {nodes * 8} GPUs (hpo/cluster)" in said
    assert "ppo_mini_batch_size=8 x actor_rollout_ref.rollout.n=8 = 64 rows" in said


@pytest.mark.parametrize(("mini_batch", "divides"), [(16, False), (6, False), (4, True), (8, True)])
def test_a_step_has_two_even_mini_batches_at_least(mini_batch, divides):
    layout = replace(LAYOUT, mini_batch_prompts=mini_batch, gpus_per_node=2)
    if divides:
        check_sharding(layout, ARCHITECTURE)
    else:
        said = refused(layout)
        assert "data.train_batch_size=16 must be a multiple of actor_rollout_ref" in said
        assert f"ppo_mini_batch_size={mini_batch}" in said
        assert "ppo_mini_batch_size to 8" in said


@pytest.mark.parametrize(
    ("change", "key"),
    [
        # 12 heads and 2 key-value heads: 2 divides both, 4 only the heads, 8 neither.
        ({"tensor": 4}, "recipe.megatron.tensor_model_parallel_size to a divisor of 2"),
        ({"rollout_tensor": 8}, "rollout.tensor_model_parallel_size=8 cannot shard"),
        # 28 layers.
        ({"pipeline": 8}, "recipe.megatron.pipeline_model_parallel_size to a divisor of 28"),
        # 8 GPUs in groups of 3.
        ({"context": 3}, "cannot be divided into model-parallel groups of 3"),
        ({"rollout_tensor": 3}, "trainer.n_gpus_per_node=8 cannot be divided into rollout replicas"),
        # 6,144 tokens in a micro-batch of 6,143.
        ({"tokens_per_gpu": 6143}, "Set actor_rollout_ref.actor.ppo_max_token_len_per_gpu to 6144"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_set(change, key):
    assert key in refused(replace(LAYOUT, **change))


def test_vllm_may_copy_key_value_heads_and_gpus_may_share_a_row():
    """4 GPUs hold 12 heads in threes and each of 2 key-value heads twice; a row of 6,144 on 2 GPUs needs 3,072 each."""
    check_sharding(replace(LAYOUT, rollout_tensor=4), ARCHITECTURE)
    check_sharding(replace(LAYOUT, context=2, tokens_per_gpu=3072), ARCHITECTURE)
    assert "to 3072" in refused(replace(LAYOUT, context=2, tokens_per_gpu=3071))


def test_a_config_that_is_no_recipe_is_not_looked_at():
    check_layout(OmegaConf.create({"trainer": {"nnodes": 3}}))


def test_an_engine_that_somebody_added_to_verl_is_not_judged():
    actor = {"strategy": "their_engine"}
    config = OmegaConf.create(
        {"recipe": {"architecture": {"layers": 1}}, "actor_rollout_ref": {"actor": actor, "rollout": {"n": 8}}}
    )
    check_layout(config)
    with pytest.raises(
        ConfigError, match=r"actor\.strategy=their_engine is not supported\. Set one of fsdp2, fsdp, megatron"
    ):
        Layout.of(config)


def test_parallel_sizes_are_named_by_the_engine_that_has_them():
    layout = replace(LAYOUT, strategy="torchtitan", nodes=3, tensor=3)
    assert "actor_rollout_ref.actor.torchtitan.tensor_parallel_size=3 cannot shard" in refused(layout)
    assert "Set recipe.megatron.tensor_model_parallel_size" in refused(replace(layout, strategy="megatron"))


@pytest.mark.parametrize(
    ("strategy", "key"), [("fsdp2", "ulysses_sequence_parallel_size"), ("veomni", "veomni.ulysses_parallel_size")]
)
def test_ulysses_divides_the_heads(strategy, key):
    said = refused(replace(LAYOUT, strategy=strategy, context=8))
    assert f"actor_rollout_ref.actor.{key}=8 cannot shard a model with 12 attention heads" in said


def test_a_node_of_the_same_name_in_somebody_elses_config_is_left_alone():
    check_layout(OmegaConf.create({"recipe": {"name": "dapo"}, "actor_rollout_ref": {"actor": {"strategy": "veomni"}}}))
    check_layout(OmegaConf.create({"recipe": "dapo"}))
