"""Sizes of the recipes against published counts, models that transformers builds, and numbers worked out by hand."""

from dataclasses import asdict, replace

import pytest
import torch
import transformers

pytest.importorskip("verl")

from hpo_plugin.check.compose import compose
from hpo_plugin.recipe.memory import GPU_MEMORY, OVERHEAD, VLLM_WORKING, Sizes

#: Of the models' pages; what transformers calls the architecture.
PUBLISHED = {
    "qwen2.5-1.5b": (1_543_714_304, "Qwen2"),
    "llama-3.2-3b": (3_212_749_824, "Llama"),
    "qwen2.5-7b": (7_615_616_512, "Qwen2"),
}


def sizes(model: str, engine: str, *overrides: str) -> Sizes:
    config, finding = compose("hpo_recipe", [f"hpo/model={model}", f"hpo/engine={engine}", *overrides])
    assert config is not None, finding
    return Sizes.of(config)


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_are_the_published_count_and_what_transformers_builds(model):
    """On the meta device, which holds shapes and no numbers."""
    published, family = PUBLISHED[model]
    architecture = sizes(model, "fsdp2").architecture
    names = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "intermediate": "intermediate_size",
        "vocab": "vocab_size",
        "tied": "tie_word_embeddings",
    }
    known = asdict(architecture)
    config = getattr(transformers, f"{family}Config")(**{theirs: known[ours] for ours, theirs in names.items()})
    with torch.device("meta"):
        built = getattr(transformers, f"{family}ForCausalLM")(config)
    built.tie_weights()
    layer = built.model.layers[0]
    assert layer.self_attn.head_dim == architecture.head_dim
    assert (layer.self_attn.q_proj.bias is not None) == architecture.attention_bias
    assert architecture.layer_parameters == sum(weight.numel() for weight in layer.parameters())
    assert architecture.parameters == sum(weight.numel() for weight in built.parameters()) == published


def test_keys_and_values_of_a_token():
    """Two of them x 28 layers x heads of 128 x 2 bytes: 2, 8 and 4 heads."""
    assert [sizes(model, "fsdp2").architecture.kv_bytes for model in PUBLISHED] == [28_672, 114_688, 57_344]


def test_fsdp2_shards_16_bytes_per_parameter_over_all_gpus():
    """7,615,616,512 on 8: 951,952,064 each; parameters 4, gradients 4, moments 8."""
    seven = sizes("qwen2.5-7b", "fsdp2")
    share = 951_952_064
    assert (seven.weights, seven.gradients, seven.optimizer) == (4 * share, 4 * share, 8 * share)
    assert seven.kept == 12 * share
    assert seven.checkpoint == 12 * 7_615_616_512
    # Seven of eight shares come from others.
    assert seven.weight_sync == 4 * 7 * share


def test_megatron_shards_a_stage_over_tensor_ranks_and_its_optimizer_over_all_ranks():
    """14 of 28 layers of 233,057,792, an embedding of 152,064 x 3,584, a norm; 2 stages x 2 tensor ranks x 2 copies."""
    seven = sizes("qwen2.5-7b", "megatron")
    stage = 14 * 233_057_792 + 152_064 * 3_584 + 3_584
    assert seven.architecture.stage_parameters(2) == stage == 3_807_810_048
    assert (seven.weights, seven.gradients, seven.optimizer) == (stage, 2 * stage, 3 * stage)
    assert seven.kept == 6 * stage
    assert seven.checkpoint == 14 * 7_615_616_512
    assert seven.weight_sync == 2 * 7_615_616_512 * 3 // 4
    # A tied model that is not split has its embedding once.
    assert sizes("llama-3.2-3b", "megatron").architecture.stage_parameters(1) == 3_212_749_824


def test_logits_are_tokens_times_vocabulary():
    """16,384 tokens. FSDP2: 2 bytes; with log-probs, 2,048 tokens of entropy in 12. Megatron: 6 and 8, on 2 ranks."""
    seven = sizes("qwen2.5-7b", "fsdp2")
    assert seven.update_logits == 16_384 * 152_064 * 2
    assert seven.log_prob_logits == (16_384 * 2 + 2_048 * 12) * 152_064
    seven = sizes("qwen2.5-7b", "megatron")
    assert seven.update_logits == 16_384 * 152_064 * 6 // 2
    assert seven.log_prob_logits == (16_384 * 8 + 2_048 * 12) * 152_064 // 2


def test_activations_are_inputs_of_layers_and_one_layer_twice():
    """Llama: 28 inputs of 3,072; a layer has 4 x 3,072, 40 x 128 of queries, keys, values, 24 x 128, and 4 x 8,192."""
    layer = 4 * 3_072 + 40 * 128 + 24 * 128 + 4 * 8_192
    assert layer == 53_248
    llama = sizes("llama-3.2-3b", "fsdp2")
    assert llama.activations == 2 * 16_384 * (28 * 3_072 + 2 * layer)
    # Two tensor ranks share the tokens between the layers' products and the widths within.
    assert sizes("llama-3.2-3b", "megatron").activations == llama.activations // 2


def test_gathered_parameters_are_fsdp2s():
    """1.5B: layers of 46,797,824, the embedding 151,936 x 1,536 = 233,373,696 larger than one."""
    small = sizes("qwen2.5-1.5b", "fsdp2")
    assert small.gathered == 2 * (2 * 46_797_824 + 233_373_696) + 6 * 233_373_696
    assert sizes("qwen2.5-1.5b", "megatron").gathered == 0


def test_peaks_are_sums_of_their_parts():
    """The update is the larger half for FSDP2; for Megatron's 1.5B, whose logits are not split, the log-probs are."""
    small = sizes("qwen2.5-1.5b", "fsdp2")
    states = small.weights + small.gradients + small.optimizer
    assert small.update_peak == states + small.gathered + small.activations + small.update_logits + OVERHEAD
    assert small.rollout_peak == int(0.6 * GPU_MEMORY) + 12 * 1_543_714_304 // 8 + OVERHEAD
    megatron = sizes("qwen2.5-1.5b", "megatron")
    states = megatron.weights + megatron.gradients + megatron.optimizer
    assert megatron.log_prob_logits > megatron.activations + megatron.update_logits
    assert megatron.update_peak == states + megatron.log_prob_logits + OVERHEAD


def test_offloading_empties_the_trainers_half_while_vllm_generates():
    offloaded = sizes("qwen2.5-7b", "megatron", "recipe.offload=True")
    assert offloaded.rollout_peak == offloaded.vllm + OVERHEAD
    assert offloaded.update_peak == sizes("qwen2.5-7b", "megatron").update_peak


def test_rows_that_vllm_holds():
    """7B on 2 GPUs: half of the weights and of 57,344 bytes a token each; rows of 6,144."""
    seven = sizes("qwen2.5-7b", "fsdp2")
    free = int(0.6 * GPU_MEMORY) - 7_615_616_512 - VLLM_WORKING
    assert seven.kv_rows == free // (28_672 * 6_144) == 233
    # More GPUs than key-value heads hold copies: 4 GPUs, 2 heads.
    small = sizes("qwen2.5-1.5b", "fsdp2", "actor_rollout_ref.rollout.tensor_model_parallel_size=4")
    free = int(0.6 * GPU_MEMORY) - 2 * 1_543_714_304 // 4 - VLLM_WORKING
    assert small.kv_rows == free // (14_336 * 6_144)


def test_tokens_of_a_step():
    """TeleLogs: 128 rows of 4,096 + 2,048, expected 2,300 + 1,024. Countdown: 2,048 of 256 + 1,024, 110 + 512."""
    telelogs = sizes("qwen2.5-1.5b", "fsdp2")
    assert (telelogs.rows, telelogs.most_tokens, telelogs.expected_tokens) == (128, 128 * 6_144, 128 * 3_324)
    countdown = sizes("qwen2.5-1.5b", "fsdp2", "hpo/task=countdown4")
    assert (countdown.rows, countdown.most_tokens, countdown.expected_tokens) == (2_048, 2_048 * 1_280, 2_048 * 622)


@pytest.mark.parametrize("engine", ["fsdp2", "megatron"])
@pytest.mark.parametrize("model", PUBLISHED)
def test_every_recipe_fits_a_node_of_eight_80_gb_gpus(model, engine):
    on_a_node = sizes(model, engine)
    assert on_a_node.fits
    assert not replace(on_a_node, gpu_memory_utilization=0.95).fits
