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
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos, metric_utils
from verl.trainer.ppo.v1 import utils as v1_utils
from verl.workers.config.actor import ActorConfig, PolicyLossConfig

from contrib.upstream.contribution import FILES
from hpo_plugin import algorithm, fused
from hpo_plugin.check.checks import check_algorithm, check_by_verl, check_registration
from hpo_plugin.check.compose import compose
from hpo_plugin.check.probe import probe
from hpo_plugin.variants import VARIANTS, settings
from hpo_plugin.verl import metrics
from hpo_plugin.verl.presets import preset_rows
from hpo_plugin.verl.seams import prepare
from hpo_plugin.verl.selection import BASE_ESTIMATORS


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
    "check": [finding.found for finding in check_registration(probe())],
}

# The command lines of docs/configuration.md, with our config and with verl's own.
sizes = ["actor_rollout_ref.actor.use_dynamic_bsz=True", "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True"]
facts["configs"] = {}
for name, *overrides in (
    ("hpo_trainer", "algorithm.policy_loss=ahpo", "algorithm.hpo.alpha_min=0.2"),
    ("hpo_trainer", "algorithm.policy_loss=hpo", "algorithm.hpo.alpha=0.3"),
    *(("hpo_trainer", f"algorithm.policy_loss={preset}") for preset in preset_rows()),
    ("hpo_megatron_trainer", "algorithm.policy_loss=ahpo"),
    ("hpo_recipe", "hpo/task=countdown4"),
    ("ppo_trainer", "algorithm.adv_estimator=hpo", "++algorithm.hpo.alpha=0.3"),
    ("ppo_trainer", "algorithm.adv_estimator=rloo", "actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"),
    ("ppo_trainer", "+algorithm.policy_loss=ahpo"),
    ("ppo_trainer", "+algorithm.policy_loss=gspo"),
    ("ppo_trainer", "algorithm.adv_estimator=hpo", "actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"),
):
    config, finding = compose(name, [*overrides, *sizes])
    assert config is not None, finding
    facts["configs"][" ".join([name, *overrides])] = said(config)

# What the plugin makes of a config: the algorithm that it finds, its lines, and the keys that it changes.
facts["prepared"] = {}
for name, *overrides in (
    ("hpo_trainer", "algorithm.policy_loss=ahpo"),
    ("hpo_trainer", "algorithm.policy_loss=gspo"),
    ("ppo_trainer", "algorithm.adv_estimator=ahpo"),
    ("ppo_trainer", "algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"),
    ("ppo_trainer", "+algorithm.policy_loss=ahpo"),
):
    config, finding = compose(name, [*overrides, *sizes])
    assert config is not None, finding
    before = config.copy()
    selection, lines = prepare(config)
    facts["prepared"][" ".join([name, *overrides])] = {
        "selection": None if selection is None else selection.label,
        "lines": lines,
        "unchanged": before == config,
        "check": [finding.found for finding in check_algorithm(before)],
    }

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
    node = OmegaConf.merge(config.algorithm, {"adv_estimator": name})
    advantages, returns = core_algos.get_adv_estimator_fn(name)(
        token_level_rewards=rewards, response_mask=mask, index=uids, config=node
    )
    facts["advantages"][name] = advantages.tolist()
    facts["plain"] = returns.tolist()

# What stands in the place of verl's functions in the driver, and verl's own functions, on the same batch.
facts["seams"] = {}
for name, *overrides in (
    ("hpo_trainer", "algorithm.policy_loss=ahpo"),
    ("hpo_trainer", "algorithm.policy_loss=hpo"),
    ("hpo_trainer", "algorithm.policy_loss=ahpo", "algorithm.adv_estimator=grpo"),
    ("ppo_trainer", "algorithm.adv_estimator=ahpo"),
    ("ppo_trainer", "algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"),
):
    config, finding = compose(name, [*overrides, *sizes])
    assert config is not None, finding
    seam, estimated = v1_utils.compute_advantage_for_multi_trajectories, []
    for function in (seam, seam.__wrapped__):
        tensors = {"token_level_rewards": rewards.clone(), "token_level_scores": rewards.clone(), "response_mask": mask}
        data = function(
            DataProto.from_dict(tensors=tensors, non_tensors={"uid": uids}),
            # Sessions of two outputs.
            batch_keys=[f"{uid}_{i // 2}_{i % 2}" for i, uid in enumerate(uids)],
            adv_estimator=config.algorithm.adv_estimator,
            config=config.algorithm,
        )
        estimated.append(data)
    replaced, own = estimated
    of_batch = {
        "prompts": torch.zeros(n, 1, dtype=torch.long),
        "responses": torch.zeros_like(mask),
        "attention_mask": torch.cat([torch.ones(n, 1, dtype=torch.long), mask], dim=1),
    }
    logged = DataProto.from_dict(tensors=dict(own.batch) | of_batch)
    seam = metric_utils.compute_data_metrics
    facts["seams"][" ".join([name, *overrides])] = {
        "same": all(torch.equal(replaced.batch[key], own.batch[key]) for key in ("advantages", "returns")),
        "added": sorted(seam(logged, use_critic=False).keys() - seam.__wrapped__(logged, use_critic=False).keys()),
    }

# A-HPO by the loss, with each estimator of verl that the plugin can apply α to. What verl logs, and what the plugin
# would log; the second time with five more prompts that have one response each.
facts["group_relative"] = [str(name.value) for name in core_algos.GROUP_RELATIVE_ESTIMATORS]
lone = torch.zeros(n + 5, length)
lone[:, 0] = torch.cat([scores, torch.tensor([1.0, -1.0, -1.0, -1.0, 0.0])])
lone_mask = torch.cat([mask, torch.ones(5, length, dtype=torch.long)])
lone_uids = np.append(uids, [f"lone-{i}" for i in range(5)])
defaults = {name: setting.default for name, setting in settings().items()}
facts["by_loss"] = {}
for name in (*BASE_ESTIMATORS, "ahpo"):
    config, finding = compose("ppo_trainer", [f"algorithm.adv_estimator={name}", *sizes])
    assert config is not None, finding
    config.actor_rollout_ref.actor.policy_loss.loss_mode = "ahpo"
    facts["by_loss"][name] = []
    for rows in (n, n + 5):
        tensors = {"token_level_rewards": lone[:rows], "response_mask": lone_mask[:rows]}
        advantages, returns = core_algos.get_adv_estimator_fn(name)(
            **{key: value.clone() for key, value in tensors.items()}, index=lone_uids[:rows], config=config.algorithm
        )
        tensors |= {"advantages": advantages, "returns": returns}
        data = SimpleNamespace(batch=tensors, non_tensor_batch={"uid": lone_uids[:rows]})
        logged = core_algos.compute_rollout_batch_info(data, config)[1]
        reward, magnitude = fused.rewards_of_responses(tensors["token_level_rewards"])
        result = algorithm.hysteretic_advantage(
            reward,
            torch.from_numpy(np.unique(lone_uids[:rows].astype(str), return_inverse=True)[1]),
            lambda counts: VARIANTS["ahpo"].alpha(counts, defaults),
            magnitude=magnitude,
            base=returns if name == "ahpo" else advantages,
            base_is_zero_without_signal=BASE_ESTIMATORS.get(name, True),
        )
        plugins = metrics.step_metrics([result.statistics])
        facts["by_loss"][name].append([logged, {key: plugins[key] for key in logged}])

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
