"""What several folders of tests use."""

import pytest


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """For verl's trainer: a model of random weights, its tokenizer, 64 + 8 problems, and a reward for random text."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from hpo_plugin.cpu.start_model import build_tokenizer
    from hpo_plugin.tasks.countdown.dataset import prepare_countdown
    from hpo_plugin.tasks.countdown.problems import CountdownConfig

    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    problems = CountdownConfig(counts=(3,), max_number=12)
    prepare_countdown(folder / "data", config=problems, layout="terse", train_size=64, test_size=8)
    # Of random text some is right, so that there is something to learn: a reward of zeros would move nothing.
    (folder / "reward.py").write_text(
        "def compute_score(solution_str, **other):\n    return float(sum(map(ord, solution_str)) % 4 == 0)\n"
    )
    return folder
