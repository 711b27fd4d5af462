"""Run with a verl that has the contribution: what is registered there, and what it computes, as one line of JSON."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import verl
from omegaconf import OmegaConf
from verl.trainer.ppo import core_algos
from verl.workers import engine_workers
from verl.workers.config.actor import ActorConfig, PolicyLossConfig

from hpo_plugin.cli._checks import check_by_verl, check_registration, compose
from hpo_plugin.cli._probe import probe
from hpo_plugin.glue.step import Rows, gather_step
from hpo_plugin.upstream.contribution import FILES


def said(config):
    """What verl's own validation says."""
    finding = check_by_verl(config)
    return "passed" if finding.ok else finding.remedy


facts = {
    "verl": verl.__file__,
    "registered": {
        f"{kind} {name}": function.__module__
        for kind, registry in (
            ("estimator", core_algos.ADV_ESTIMATOR_REGISTRY),
            ("loss", core_algos.POLICY_LOSS_REGISTRY),
        )
        for name, function in registry.items()
        if "hpo" in name
    },
    "worker": engine_workers.ActorRolloutRefWorker.actor_worker_cls.__module__,
    "check": [finding.found for finding in check_registration(probe())],
}

# The command lines of docs/configuration.md, with our config and with verl's own.
sizes = ["actor_rollout_ref.actor.use_dynamic_bsz=True", "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True"]
facts["configs"] = {}
for name, *overrides in (
    ("hpo_trainer", "algorithm.policy_loss=ahpo", "algorithm.hpo.alpha_min=0.2"),
    ("hpo_trainer", "algorithm.policy_loss=hpo", "algorithm.hpo.alpha=0.3"),
    ("hpo_trainer", "algorithm.policy_loss=gspo"),
    ("hpo_megatron_trainer", "algorithm.policy_loss=ahpo"),
    ("hpo_recipe", "recipe/task=countdown4"),
    ("ppo_trainer", "algorithm.adv_estimator=hpo", "++algorithm.hpo.alpha=0.3"),
    ("ppo_trainer", "algorithm.adv_estimator=hpo", "actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"),
):
    config, finding = compose(name, [*overrides, *sizes])
    assert config is not None, finding
    facts["configs"][" ".join([name, *overrides])] = said(config)

# The contributed scripts, run with a python3 that prints its arguments.
facts["scripts"] = {}
for script in sorted(FILES.glob("examples/hpo_trainer/*.sh.in")):
    with tempfile.TemporaryDirectory() as directory:
        stub = Path(directory) / "python3"
        stub.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\"\n")
        stub.chmod(0o755)
        environment = os.environ | {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=True)
    module, *overrides = done.stdout.split("\0")[1:-1]
    config, finding = compose("ppo_trainer", overrides)
    assert module == "verl.trainer.main_ppo"
    assert config is not None, finding
    facts["scripts"][script.name.removesuffix(".in")] = [
        config.algorithm.adv_estimator,
        config.actor_rollout_ref.actor.strategy,
        said(config),
    ]

# A batch of three prompts with eight responses each: sparse, shaped, and equal rewards.
generator = torch.Generator().manual_seed(3)
n, length = 24, 6
lengths = torch.randint(1, length + 1, (n,), generator=generator)
mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
scores = torch.cat([torch.tensor([1.0] + [0.0] * 7), torch.rand(8, generator=generator), torch.full((8,), 0.1)])
rewards = torch.zeros(n, length)
rewards[:, 0] = scores
uids = np.array([f"prompt-{i // 8}" for i in range(n)], dtype=object)
config, _ = compose("hpo_trainer", ["algorithm.policy_loss=ahpo", "algorithm.hpo.alpha=0.3"])
facts["batch"] = {"scores": scores.tolist(), "mask": mask.tolist()}
facts["advantages"] = {}
for name in ("hpo", "ahpo"):
    algorithm = OmegaConf.merge(config.algorithm, {"adv_estimator": name})
    advantages, returns = core_algos.get_adv_estimator_fn(name)(
        token_level_rewards=rewards, response_mask=mask, index=uids, config=algorithm
    )
    facts["advantages"][name] = advantages.tolist()
    facts["plain"] = returns.tolist()

# A-HPO by the loss: with each estimator of verl that knows groups, the batch above and five prompts with one response.
facts["group_relative"] = [str(name.value) for name in core_algos.GROUP_RELATIVE_ESTIMATORS]
lone = torch.zeros(n + 5, length)
lone[:, 0] = torch.cat([scores, torch.tensor([1.0, -1.0, -1.0, -1.0, 0.0])])
lone_mask = torch.cat([mask, torch.ones(5, length, dtype=torch.long)])
lone_uids = np.append(uids, [f"lone-{i}" for i in range(5)])
facts["by_loss"] = {}
for name in ("grpo", "rloo", "gpg", "opo", "reinforce_plus_plus_baseline", "ahpo"):
    config, finding = compose("ppo_trainer", [f"algorithm.adv_estimator={name}", *sizes])
    assert config is not None, finding
    config.actor_rollout_ref.actor.policy_loss.loss_mode = "ahpo"
    advantages, returns = core_algos.get_adv_estimator_fn(name)(
        token_level_rewards=lone.clone(), response_mask=lone_mask, index=lone_uids, config=config.algorithm
    )
    tensors = {"token_level_rewards": lone, "response_mask": lone_mask, "advantages": advantages, "returns": returns}
    data = SimpleNamespace(batch=tensors, non_tensor_batch={"uid": lone_uids})
    metrics = core_algos.compute_rollout_batch_info(data, config)[1]
    step = gather_step(
        Rows.of(returns, lone_mask, lone_uids),
        adv_estimator=name,
        hysteresis="ahpo",
        weigh="loss",
        alpha=0.6,
        alpha_min=0.1,
        all_gather=lambda rows: [rows],
    )
    facts["by_loss"][name] = [metrics, {key: step.metrics[key.removeprefix("actor/")] for key in metrics}]

old = -torch.rand(n, length, generator=generator)
new = (old + 0.5 * torch.randn(n, length, generator=generator)).requires_grad_()
actor = ActorConfig(
    strategy="fsdp", rollout_n=8, ppo_micro_batch_size_per_gpu=1, policy_loss=PolicyLossConfig(loss_mode="hpo")
)
actor.rollout_batch_info["hpo_alpha"] = 0.3
loss, _ = core_algos.get_policy_loss_fn("hpo")(old, new, torch.tensor(facts["plain"]), mask, "token-mean", actor)
loss.backward()
facts["loss"] = {"old": old.tolist(), "new": new.tolist(), "value": loss.item(), "gradient": new.grad.tolist()}
print(json.dumps(facts))
