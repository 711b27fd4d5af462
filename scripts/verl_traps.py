"""Traps of verl that were found while HPO was written for it, each with the least that shows it.

    python scripts/verl_traps.py [--checkout PATH]

Without a git checkout of verl, the trap in a file that verl's packages do not contain is left out.
``tests/upstream/test_verl_traps.py`` runs each, and fails when verl no longer has it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SLURM_TEMPLATE = "examples/tutorial/slurm/ray_on_slurm.slurm"


def swallowed_plugin_error() -> str:
    """A plugin that cannot be loaded is silent: verl logs the exception at DEBUG (verl/__init__.py).

    Returns:
        What ``import verl`` prints with a plugin whose module raises.
    """
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "broken_plugin.py").write_text("raise ImportError('a dependency is missing')\n")
        metadata = Path(directory) / "broken_plugin-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text("[verl.plugins]\nbroken = broken_plugin\n")
        path = os.pathsep.join(filter(None, [directory, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "VERL_USE_EXTERNAL_PLUGINS": "broken"}
        script = "import verl, sys; print('broken_plugin' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        done.check_returncode()
        return done.stderr + done.stdout


def sapo_example_override() -> str:
    """The override of verl's SAPO example is refused: the fields are those of the actor, not of its policy_loss.

    Returns:
        The error that examples/sapo_trainer/run_qwen3_8b_fsdp.sh ends with.
    """
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass

    overrides = [
        "actor_rollout_ref.actor.policy_loss.loss_mode=sapo",
        "+actor_rollout_ref.actor.policy_loss.tau_pos=1.0",
        "+actor_rollout_ref.actor.policy_loss.tau_neg=1.05",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    try:
        omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    except Exception as error:
        return str(error)
    return "accepted"


def unused_switch_of_grpo_vectorized() -> tuple[float, float]:
    """``algorithm.norm_adv_by_std_in_grpo=False`` changes ``grpo`` and not ``grpo_vectorized``: it is never passed.

    Returns:
        The largest advantage of two responses with rewards 0 and 1, by ``grpo`` and by ``grpo_vectorized``.
    """
    import numpy as np
    import torch
    from omegaconf import OmegaConf
    from verl.protocol import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    def largest(adv_estimator: str) -> float:
        data = DataProto.from_dict(
            tensors={"token_level_rewards": torch.tensor([[0.0], [1.0]]), "response_mask": torch.ones(2, 1)},
            non_tensors={"uid": np.array(["prompt", "prompt"], dtype=object)},
        )
        config = OmegaConf.create({"adv_estimator": adv_estimator, "norm_adv_by_std_in_grpo": False})
        data = compute_advantage(data, adv_estimator=adv_estimator, norm_adv_by_std_in_grpo=False, config=config)
        return float(data.batch["advantages"].max())

    return largest("grpo"), largest("grpo_vectorized")


def rounding_of_grpo() -> list[float]:
    """Eight equal rewards give eight negative advantages: the rounding error of the mean, divided by 1e-6.

    Returns:
        The advantages that ``grpo`` gives eight rewards of 0.1.
    """
    import numpy as np
    import torch
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    advantages, _ = compute_grpo_outcome_advantage(torch.full((8, 1), 0.1), torch.ones(8, 1), np.array(["prompt"] * 8))
    return advantages.flatten().tolist()


def mean_over_no_tokens() -> tuple[float, float]:
    """``token-mean`` of a mini-batch without an unmasked token is 0 / 0: entropy and KL terms are NaN in the log.

    Returns:
        The loss that ``agg_loss`` gives such a mini-batch, and the largest entry of its gradient.
    """
    import torch
    from verl.trainer.ppo.core_algos import agg_loss

    entropy = torch.ones(2, 3, requires_grad=True)
    loss = agg_loss(entropy, torch.zeros(2, 3), "token-mean", dp_size=1, batch_num_tokens=0)
    (gradient,) = torch.autograd.grad(loss, entropy)
    return float(loss), float(gradient.abs().max())


def quoted_node_list_of_slurm(checkout: Path) -> list[str]:
    """The SLURM template takes all nodes for one: ``nodes_array=("$nodes")`` is an array of one element.

    Args:
        checkout: of verl.

    Returns:
        The nodes that the template starts Ray on, one entry a start, in a job of two nodes, node1 and node2.
    """
    stubs = {
        "scontrol": "printf 'node1\\nnode2\\n'",
        # srun --nodes=1 --ntasks=1 -w NODE COMMAND ...
        "srun": 'case "$*" in *"hostname"*) echo 10.0.0.1;; *"ray start"*) printf "%s\\0" "$4" >>"$STARTS";; esac',
        "sleep": "true",
        "printenv": "true",
    }
    with tempfile.TemporaryDirectory() as directory:
        for name, body in stubs.items():
            stub = Path(directory) / name
            stub.write_text(f"#!/bin/bash\n{body}\n")
            stub.chmod(0o755)
        starts = Path(directory) / "starts"
        environment = {
            "PATH": f"{directory}{os.pathsep}{os.environ['PATH']}",
            "STARTS": str(starts),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_GPUS_PER_NODE": "1",
            "SLURM_NNODES": "2",
        }
        script = f"cd {directory}; source {checkout.resolve() / SLURM_TEMPLATE}; wait"
        subprocess.run(["bash", "-c", script], env=environment, capture_output=True, check=True)
        return sorted(starts.read_text().split("\0")[:-1])


def main() -> None:
    """Print what verl does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="a git checkout of verl")
    checkout = parser.parse_args().checkout
    print("A plugin that raises; is it loaded, and what is said:", repr(swallowed_plugin_error()))
    print("SAPO example:", sapo_example_override())
    print("norm_adv_by_std_in_grpo=False, grpo and grpo_vectorized:", *unused_switch_of_grpo_vectorized())
    print("grpo, eight rewards of 0.1:", *rounding_of_grpo())
    print("token-mean over no tokens, loss and gradient:", *mean_over_no_tokens())
    if checkout is not None:
        print("SLURM template, Ray is started on:", quoted_node_list_of_slurm(checkout))


if __name__ == "__main__":
    main()
