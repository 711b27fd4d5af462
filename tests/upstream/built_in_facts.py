"""Run with a verl that has the contribution: what is registered there, and what it computes, as one line of JSON."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
import verl
from omegaconf import OmegaConf
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1 import utils as v1_utils

from contrib.upstream.contribution import FILES
from hpo_plugin import variants
from hpo_plugin.check.checks import check_algorithm, check_by_verl, check_registration
from hpo_plugin.check.compose import compose
from hpo_plugin.check.probe import probe
from hpo_plugin.errors import ConfigError
from hpo_plugin.verl import metrics
from hpo_plugin.verl.estimators import estimator
from hpo_plugin.verl.presets import preset_rows
from hpo_plugin.verl.seams import prepare


def said(config):
    """What verl's own validation says, with what the plugin puts before it."""
    finding = check_by_verl(config)
    return "passed" if finding.ok else finding.remedy


def module(function):
    return getattr(function, "func", function).__module__


variants.register_variant(variants.Variant("ours", "Ours", "α = 1", lambda counts, values: 1.0))
facts = {
    "verl": verl.__file__,
    "registered": {
        f"{kind} {name}": module(function)
        for kind, registry in (
            ("estimator", core_algos.ADV_ESTIMATOR_REGISTRY),
            ("loss", core_algos.POLICY_LOSS_REGISTRY),
        )
        for name, function in registry.items()
        if name in ("hpo", "ahpo", "ours")
    },
    "check": [finding.found for finding in check_registration(probe())],
}

# The command lines of docs/configuration.md, with our config and with verl's own.
sizes = [
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
    "actor_rollout_ref.rollout.n=8",
]
by_loss = "actor_rollout_ref.actor.policy_loss.loss_mode=ahpo"
facts["configs"] = {}
for name, *overrides in (
    ("hpo_trainer", "algorithm.policy_loss=ahpo", "algorithm.hpo.alpha_min=0.2"),
    ("hpo_trainer", "algorithm.policy_loss=hpo", "algorithm.hpo.alpha=0.3"),
    *(("hpo_trainer", f"algorithm.policy_loss={preset}") for preset in preset_rows()),
    ("hpo_megatron_trainer", "algorithm.policy_loss=ahpo"),
    ("hpo_recipe", "hpo/task=countdown4"),
    ("ppo_trainer", "algorithm.adv_estimator=hpo", "algorithm.hpo.alpha=0.3"),
    ("ppo_trainer", "algorithm.adv_estimator=hpo", "++algorithm.hpo.alpha=0.3"),
    ("ppo_trainer", "algorithm.adv_estimator=grpo", by_loss),
    ("ppo_trainer", "algorithm.adv_estimator=ours"),
    ("ppo_trainer", "+algorithm.policy_loss=ahpo"),
    ("ppo_trainer", "+algorithm.policy_loss=gspo"),
    # verl's own keys, in runs without HPO, and where verl adds some.
    ("ppo_trainer", "algorithm.adv_estimator=grpo", "algorithm.hpo.alpha=0.3"),
    ("ppo_trainer", "algorithm.adv_estimator=grpo", "algorithm.hpo.alpha_min=2", "+algorithm.hpo._target_=X"),
    ("ppo_trainer", "algorithm.adv_estimator=ahpo", "+algorithm.hpo.alpha_max=0.9"),
    # The legacy trainer, with our loss on verl's estimator.
    ("ppo_trainer", "+algorithm.policy_loss=ahpo", "trainer.use_v1=False"),
    # Refused:
    ("ppo_trainer", "algorithm.adv_estimator=hpo", by_loss),
    ("ppo_trainer", "algorithm.adv_estimator=rloo", by_loss),
    ("ppo_trainer", "algorithm.adv_estimator=ahpo", "+algorithm.hpo.base_estimator=rloo"),
    ("hpo_trainer", "algorithm.policy_loss=ahpo", "algorithm.hpo.base_estimator=rloo"),
    ("hpo_trainer", "algorithm.policy_loss=ahpo", "algorithm.use_kl_in_reward=True"),
    ("hpo_trainer", "algorithm.policy_loss=gspo", "algorithm.adv_estimator=ahpo"),
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
    ("ppo_trainer", "algorithm.adv_estimator=ahpo", "algorithm.hpo.alpha_min=0.2", "algorithm.use_kl_in_reward=True"),
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

# The contributed script, run with a python3 that prints its arguments.
facts["scripts"] = {}
for script in sorted(FILES.glob("examples/hpo_trainer/*.sh.in")):
    with tempfile.TemporaryDirectory() as directory:
        stub = Path(directory) / "python3"
        stub.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\"\n")
        stub.chmod(0o755)
        environment = os.environ | {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=True)
    main, *overrides = done.stdout.split("\0")[1:-1]
    config, finding = compose("ppo_trainer", overrides)
    assert main == "verl.trainer.main_ppo"
    assert config is not None, finding
    facts["scripts"][script.name.removesuffix(".in")] = [
        config.algorithm.adv_estimator,
        config.actor_rollout_ref.actor.strategy,
        said(config),
    ]

# Prompts with eight responses each: sparse, shaped, equal rewards, one success on one token and on three, and padding.
generator = torch.Generator().manual_seed(3)
n, length = 34, 6
lengths = torch.randint(3, length + 1, (n,), generator=generator)
lengths[32:] = 0
mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
rewards = torch.zeros(n, length)
rewards[0, 0] = 1.0
rewards[8:16, 0] = torch.rand(8, generator=generator)
rewards[16:24, 0] = 0.1
rewards[24:32, 0] = 0.3
rewards[24, :3] = 0.1
uids = np.array([f"prompt-{i // 8}" for i in range(n)], dtype=object)
facts["batches"] = {}
for name, *overrides in (
    ("hpo_trainer", "algorithm.policy_loss=ahpo"),
    ("hpo_trainer", "algorithm.policy_loss=hpo", "algorithm.hpo.alpha=0.3"),
    ("ppo_trainer", "algorithm.adv_estimator=ahpo", "algorithm.norm_adv_by_std_in_grpo=False"),
    ("ppo_trainer", "algorithm.adv_estimator=hpo"),
    ("ppo_trainer", "algorithm.adv_estimator=hpo", "algorithm.hpo.alpha=0"),
):
    config, finding = compose(name, [*overrides, *sizes])
    assert config is not None, finding
    kwargs = {"token_level_rewards": rewards, "response_mask": mask}
    own = estimator(config.algorithm.adv_estimator)(**kwargs, index=uids, config=config.algorithm)
    logged = metrics.drain()
    built_in = v1_utils.compute_advantage_for_multi_trajectories(
        DataProto.from_dict(tensors=kwargs, non_tensors={"uid": uids}),
        batch_keys=[f"{uid}_{i}_0" for i, uid in enumerate(uids)],
        adv_estimator=config.algorithm.adv_estimator,
        config=config.algorithm,
    )
    facts["batches"][" ".join([name, *overrides])] = {
        "advantages": [(own[0] * mask).tolist(), built_in.batch["advantages"].tolist()],
        "returns": [(own[1] * mask).tolist(), built_in.batch["returns"].tolist()],
        "metrics": [logged, metrics.drain()],
    }

# Estimators of that name that do something else: no metric of ours, and no error.
original = core_algos.ADV_ESTIMATOR_REGISTRY["ahpo"]
facts["others"] = {}
for case, change, changed in (
    ("another weight", lambda a, r: (1.5 * a, r), {}),
    ("not finite", lambda a, r: (a, r), {"token_level_rewards": torch.full_like(rewards, torch.nan)}),
    ("no uid", lambda a, r: (a, r), {"uid": None}),
):

    def other(*, change=change, **kwargs):
        mask = kwargs["response_mask"]
        return change(mask.float(), mask.float())

    other.__module__ = "verl.trainer.ppo.another_module"
    core_algos.ADV_ESTIMATOR_REGISTRY["ahpo"] = other
    tensors = {"token_level_rewards": rewards, "response_mask": mask} | changed
    ids = {"uid": uids} if "uid" not in tensors else {}
    tensors.pop("uid", None)
    config, _ = compose("ppo_trainer", ["algorithm.adv_estimator=ahpo", *sizes])
    assert prepare(config)[0] is None
    v1_utils.compute_advantage_for_multi_trajectories(
        DataProto.from_dict(tensors=tensors, non_tensors=ids),
        batch_keys=[f"{uid}_{i // 2}_{i % 2}" for i, uid in enumerate(uids)],
        adv_estimator="ahpo",
        config=config.algorithm,
    )
    facts["others"][case] = metrics.drain()
core_algos.ADV_ESTIMATOR_REGISTRY["ahpo"] = original

# A preset that nothing applied, because the trainer checks no config.
config, _ = compose("hpo_trainer", ["algorithm.policy_loss=ahpo", "algorithm.adv_estimator=grpo", *sizes])
try:
    v1_utils.compute_advantage_for_multi_trajectories(
        DataProto.from_dict(tensors=kwargs, non_tensors={"uid": uids}),
        batch_keys=[f"{uid}_{i}_0" for i, uid in enumerate(uids)],
        adv_estimator=config.algorithm.adv_estimator,
        config=OmegaConf.masked_copy(config, ["algorithm"]).algorithm,
    )
except ConfigError as error:
    facts["not applied"] = str(error)
print(json.dumps(facts))
