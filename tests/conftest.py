"""What several folders of tests use."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Before any import of torch, and for all processes that tests start. The tensors are small: threads of OpenMP only wait
# for each other, and on busy cores this takes several times the time of the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Import a file of ``scripts/`` by its name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        # A dataclass looks for its module there.
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """For verl's trainer: a model of random weights, its tokenizer, 64 + 8 problems, and a reward for random text."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from hpo_plugin.quickstart.start_model import build_tokenizer
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


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory) -> Path:
    """The wheel of the files as they are, built with the environment's setuptools."""
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools 77 or newer")
    source = tmp_path_factory.mktemp("source")
    for name in ("hpo_plugin", "hydra_plugins", "recipes", "studies"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(source)], cwd=source, check=True, capture_output=True)
    (path,) = source.glob("*.whl")
    return path
