"""``python -m hpo_plugin.openrlhf``: what it refuses, what it passes on, and that α is applied in Ray's workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openrlhf.cli", reason="OpenRLHF is not installed (make test-openrlhf)")

import openrlhf_harness as harness
import torch

from hpo_plugin.algorithm import group_relative_advantage
from hpo_plugin.errors import ConfigError
from hpo_plugin.openrlhf import command
from hpo_plugin.openrlhf.experience import check_arguments

ROOT = Path(__file__).parents[2]


def start(*arguments, **variables):
    """A process of its own: the command wraps functions for good."""
    paths = [ROOT, Path(__file__).parent, Path(__file__).with_name("stand_ins")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        # A cluster of its own, whatever else runs here.
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        **variables,
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=580
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tokenizer and prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config

    folder = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(harness.WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)
    Qwen2Config().save_pretrained(folder)
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"input": f"w{i}"}) for i in range(2, 10)))
    return folder


@pytest.mark.timeout(600)
def test_alpha_is_applied_in_rays_workers_by_the_command(model, tmp_path):
    """Both trainers, a variant from a module, a job's runtime environment, the arguments as they were."""
    arguments = harness.words(
        harness.OPTIONS
        | {
            "algo.advantage.estimator": "group_norm",
            "algo.kl.init_coef": 0,
            "reward.clip_range": (-20, 20),
            "reward.remote_url": "http://127.0.0.1:1",
            "actor.model_name_or_path": model,
            "data.prompt_dataset": model / "prompts.jsonl",
        }
    )
    # Of OpenRLHF, though it looks like one of the command's.
    arguments.append("--logger.wandb.run_name=--hpo.policy")
    # What `ray job submit --runtime-env-json` gives the driver.
    job = {"runtime_env": {"env_vars": {"MINE": "1"}}, "metadata": {}}
    out = tmp_path / "out"
    done = start(
        str(Path(__file__).with_name("command_harness.py")),
        str(out),
        *["--hpo.policy", "tenth", *arguments, "--hpo.share=0.5"],
        NCCL_DEBUG="INFO",
        RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps(job),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Tenth: α = share / 10, share = 0.5" in done.stdout
    found = torch.load(out)
    assert found["arguments"] == arguments
    for name in ("PPOTrainer", "TrainingActor"):
        sent = found[name]
        assert sent["process"] != found["process"]
        # The job's, the user's, and OpenRLHF's own.
        assert sent["environment"] == {"MINE": "1", "NCCL_DEBUG": "INFO", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
        own = group_relative_advantage(sent["rewards"], torch.arange(64) // 8, epsilon=harness.OPENRLHF_EPSILON)
        expected = torch.where(own.advantage < 0, 0.05 * own.advantage, own.advantage)
        assert sent["advantages"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
        assert sent["info"]["hpo/alpha"].tolist() == pytest.approx([0.05] * 4)


def test_a_refused_argument_ends_the_command_before_ray():
    done = start("-m", "hpo_plugin.openrlhf", "--algo.advantage.estimator", "rloo")
    assert done.returncode == 1
    assert "error: --algo.advantage.estimator rloo does not give HPO's objective" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Ray" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--hpo.policy", "grpo"],
            r"--hpo\.policy='grpo' is not a variant\. Set --hpo\.policy to one of 'hpo', 'ahpo'",
        ),
        (["--hpo.policy", "hpo", "--hpo.alpha", "1.5"], r"--hpo\.alpha=1\.5 is not a number in \[0, 1\]"),
        (["--hpo.policy", "hpo", "--hpo.alpha", "nan"], r"--hpo\.alpha=nan is not a number in \[0, 1\]"),
        (["--hpo.alpha_min", "-1"], r"--hpo\.alpha_min=-1\.0 is not a number in \[0, 1\]"),
        (["--hpo.alpha", "0.5"], r"--hpo\.alpha=0\.5 has no effect with --hpo\.policy='ahpo'.*--hpo\.policy='hpo'"),
    ],
)
def test_settings_of_hpo_are_checked(monkeypatch, arguments, said):
    monkeypatch.setattr(sys, "argv", ["hpo_plugin.openrlhf", *arguments])
    with pytest.raises(ConfigError, match=said):
        command.main()


def test_ray_without_the_hook_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hpo_plugin.openrlhf"])
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="Ray is already initialized"):
        command.main()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algo.advantage.estimator": "dr_grpo"},
        {"algo.kl.init_coef": 0.01, "algo.kl.use_loss": True},
        {"actor.dual_clip": 3.0},
        {"train.dynamic_batch_enable": True, "ds.zero_stage": 3},
        # OpenRLHF sets it to 1 for both estimators.
        {"algo.advantage.gamma": 0.9},
        {"train.batch_size": 32, "actor.num_gpus_per_node": 4, "actor.num_nodes": 2},
        {"train.batch_size": 16, "actor.num_gpus_per_node": 8, "ds.ring_attn_size": 2},
        # OpenRLHF keeps what it does not train on for the next rollout batch.
        {"rollout.vllm_generate_batch_size": 12, "train.async_enable": True},
        # One process gets all micro-batches, the last of which is shorter.
        {"rollout.micro_batch_size": 5},
        # OpenRLHF leaves out what does not fill an optimizer step.
        {"train.batch_size": 48, "train.dynamic_batch_enable": True, "ds.zero_stage": 3},
    ],
)
def test_what_is_hpo_is_accepted(changes):
    check_arguments(harness.parse(harness.REQUIRED + harness.words(harness.OPTIONS | changes)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            (
                {"algo.advantage.estimator": name},
                rf"--algo\.advantage\.estimator {name} does not give HPO's objective.*group_norm or dr_grpo",
            )
            for name in ("gae", "reinforce", "rloo", "reinforce_baseline", "flash_reinforce")
        ),
        ({"rollout.n_samples_per_prompt": 1}, r"--rollout\.n_samples_per_prompt 1 does not give HPO's objective"),
        (
            {"algo.kl.init_coef": 0.01},
            r"--algo\.kl\.init_coef 0\.01 does not give HPO's objective.*--algo\.kl\.use_loss",
        ),
        ({"actor.loss_agg_mode": "seq-mean-token-mean"}, r"--actor\.loss_agg_mode seq-mean.*token-mean"),
        (
            {"actor.policy_loss_type": "gspo"},
            r"--actor\.policy_loss_type gspo does not give HPO's objective.*Set it to ppo",
        ),
        ({"reward.clip_range": (0, 10)}, r"--reward\.clip_range \[0\.0, 10\.0\] does not give HPO's objective"),
        *(
            (
                {"train.dynamic_batch_enable": True, "ds.zero_stage": stage},
                rf"--train\.dynamic_batch_enable with --ds\.zero_stage {stage} loses gradients.*last micro-batch",
            )
            for stage in (1, 2)
        ),
        *(
            (
                {"train.batch_size": size},
                rf"--train\.batch_size {size} does not divide --rollout\.batch_size 8 × "
                r"--rollout\.n_samples_per_prompt 8 = 64.*Set --train.batch_size to a divisor of 64",
            )
            for size in (48, 128)
        ),
        (
            {"rollout.vllm_generate_batch_size": 5},
            r"--train\.batch_size 64 does not divide --rollout\.vllm_generate_batch_size 5 × .* 8 = 40",
        ),
        (
            {"train.micro_batch_size": 3},
            r"--train\.batch_size 64 is not a multiple of --train\.micro_batch_size 3 × 1 .* = 3: .*Change one",
        ),
        (
            {"train.batch_size": 16, "actor.num_gpus_per_node": 16, "ds.ring_attn_size": 2},
            r"--train\.batch_size 16 is not a multiple of --train\.micro_batch_size 4 × 8 data-parallel processes = 32",
        ),
        (
            {"rollout.micro_batch_size": 5, "actor.num_gpus_per_node": 2},
            r"--rollout\.micro_batch_size 5 × 2 data-parallel processes = 10 does not divide the 64 responses",
        ),
    ],
)
def test_what_would_not_be_hpo_is_refused_with_what_to_do(changes, said):
    try:
        args = harness.parse(harness.REQUIRED + harness.words(harness.OPTIONS | changes))
    except SystemExit:
        pytest.skip("an OpenRLHF without this option")
    with pytest.raises(ConfigError, match=said):
        check_arguments(args)


def test_openrlhfs_defaults_are_refused():
    """The critic's advantages, and a KL penalty in the reward."""
    with pytest.raises(ConfigError, match=r"--algo\.advantage\.estimator gae"):
        check_arguments(harness.parse([]))


@pytest.mark.parametrize("found", ["0.10.4", "0.12.0"])
def test_another_openrlhf_is_refused_with_its_version(monkeypatch, found):
    monkeypatch.setattr(command, "version", lambda _: found)
    with pytest.raises(ImportError, match=rf"needs openrlhf>=0\.11,<0\.12, but openrlhf {found} is installed"):
        command.require_openrlhf()


def test_an_openrlhf_that_moved_what_is_wrapped_is_refused(monkeypatch):
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    command.require_openrlhf()
    monkeypatch.delattr(RemoteExperienceMaker, "compute_advantages_and_returns")
    with pytest.raises(ImportError, match=r"openrlhf 0\.11.* has no .*RemoteExperienceMaker\.compute_advantages"):
        command.require_openrlhf()
