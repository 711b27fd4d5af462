"""Wrong settings, as a user types them, and what the error of each has to say.

Every row is a command line with one mistake. The command has to stop before it starts Ray or writes a checkpoint, and
its error has to name the key, the value and the remedy. ``tests/torture/test_settings.py`` calls in one process what
the commands call; the probe runs the commands.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

from torture.probe import Probe, Result

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "robustness.md"
#: Time limit of one command, in seconds.
LIMIT = 600.0
#: ``main_ppo`` prints it before it starts Ray.
RAY_STARTS = "ray init kwargs"

#: Configs of ``verl.trainer.main_ppo`` -> the overrides that every run needs.
_FILES = (
    "data.train_files={work}/train.parquet data.val_files={work}/test.parquet actor_rollout_ref.model.path={work}/model"
)
_SIZES = (
    f"{_FILES} critic.model.path={{work}}/model actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1 "
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1 actor_rollout_ref.rollout.n=8 "
    "data.train_batch_size=64 actor_rollout_ref.actor.ppo_mini_batch_size=32"
)
CONFIGS = {
    "ppo_trainer": _SIZES,
    "ppo_megatron_trainer": _SIZES,
    "hpo_trainer": _SIZES,
    "hpo_recipe": _FILES,
    "countdown_cpu": _FILES,
    "telelogs_cpu": _FILES,
}
CHECK = "hpo-plugin check"
#: A study with one arm; the words of a row change keys of it.
STUDY = {
    "name": "small",
    "title": "Small",
    "config_name": "hpo_trainer",
    "steps": 4,
    "test_every": 2,
    "settings": {"easy": {"title": "Easy"}},
    "arms": {"hpo": {"title": "HPO", "overrides": ["algorithm.policy_loss=hpo"]}},
    "experiments": {"one": {"title": "One", "setting": "easy", "arms": ["hpo"], "seeds": [0, 1]}},
}
_PARSER = (
    "import sys; from trl import TrlParser; from hpo_plugin.trl import HPOConfig; "
    "TrlParser(HPOConfig).parse_args_and_config()"
)


@dataclass(frozen=True)
class Wrong:
    """A command with a mistake.

    Attributes:
        command: A config of :data:`CONFIGS`, for ``verl.trainer.main_ppo``, or a key of :func:`argv`.
        words: The words that a user adds. ``{work}`` stands for the directory with the inputs.
        says: The keys with their values, as the error has to contain them; by default the last word.
        remedy: A part of the error that says what to do.
        right: The words after the remedy, with which the command has to start; None if this is not tried.
        environment: Variables of the process. Rows with variables are tried by the probe only.
    """

    command: str
    words: str
    remedy: str
    says: tuple[str, ...] = ()
    right: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def named(self) -> tuple[str, ...]:
        """What the error has to contain besides the remedy."""
        return self.says or (shlex.split(self.words)[-1].lstrip("+"),)

    @property
    def name(self) -> str:
        """A name for tests and failures."""
        return f"{self.command}: {self.words}"


def argv(row: Wrong, work: Path) -> list[str]:
    """The command line of a row."""
    words = shlex.split(row.words.replace("{work}", str(work)))
    plugin = [sys.executable, "-m", "hpo_plugin.cli"]
    if row.command in CONFIGS:
        base = CONFIGS[row.command].replace("{work}", str(work)).split()
        trainer = [sys.executable, "-m", "verl.trainer.main_ppo", f"--config-name={row.command}"]
        return [*trainer, *base, *words, f"hydra.run.dir={work}/hydra"]
    if row.command == CHECK:
        base = CONFIGS["hpo_trainer"].replace("{work}", str(work)).split()
        named = [] if any(word.startswith("--config-name") for word in words) else ["--config-name=hpo_trainer"]
        reward = f"reward.custom_reward_function.path={work}/reward.py"
        # A second value of a key without `+` replaces the first.
        return [*plugin, "check", "--local", *named, *base, reward, *words]
    if row.command == "hpo-plugin study":
        declared = OmegaConf.merge(OmegaConf.create(STUDY), OmegaConf.from_dotlist(words))
        file = work / "STUDY.yaml"
        OmegaConf.save(declared, file)
        return [*plugin, "study", "run", str(file), "--output", str(work / "runs")]
    if row.command == "HPOConfig":
        return [sys.executable, "-c", _PARSER, "--output_dir", str(work), "--use_cpu", "--bf16", "no", *words]
    if row.command == "hpo_plugin.openrlhf":
        return [sys.executable, "-m", "hpo_plugin.openrlhf", *words]
    return [*plugin, *row.command.split()[1:], *words]


_ADV, _LOSS = "algorithm.adv_estimator", "actor_rollout_ref.actor.policy_loss.loss_mode"
_ACTOR, _ROLLOUT, _AGG = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.actor.loss_agg_mode"
_AHPO, _HPO = "+algorithm.policy_loss=ahpo", "+algorithm.policy_loss=hpo"
_RANGE = "Set a number in [0, 1]"
_CORRECTION = "algorithm.rollout_correction"


def _stock(command: str) -> tuple[Wrong, ...]:
    wrong = functools.partial(Wrong, command)
    return (
        # The name of the algorithm.
        wrong("+algorithm.policy_loss=HPO", "Choose one of: grpo", right=_HPO),
        wrong("+algorithm.policy_loss=a-hpo", "Choose one of: grpo", right=_AHPO),
        wrong("+algorithm.policy_loss=", "Choose one of: grpo", right=_AHPO),
        wrong("algorithm.policy_loss=ahpo", "To append to your config use +algorithm.policy_loss=ahpo", right=_AHPO),
        wrong("+algorithm.policyloss=ahpo", "set algorithm.policy_loss=ahpo", right=_AHPO),
        wrong("+policy_loss=hpo", "set algorithm.policy_loss=hpo", right=_HPO),
        wrong(f"{_ACTOR}.policy_loss=ahpo", "set algorithm.policy_loss=ahpo", right=_AHPO),
        wrong(f"{_ADV}=AHPO", f"Set {_ADV} to one of ahpo", right=f"{_ADV}=ahpo"),
        wrong(f"{_ADV}=a_hpo", f"Set {_ADV} to one of ahpo", right=f"{_ADV}=ahpo"),
        wrong(f"{_ADV}=grpo {_LOSS}=HPO", f"Set {_LOSS} to one of ahpo", right=f"{_ADV}=grpo {_LOSS}=hpo"),
        wrong(f"{_ADV}=ahpo {_LOSS}=vanila", f"Set {_LOSS} to one of ahpo", right=f"{_ADV}=ahpo {_LOSS}=vanilla"),
        # α and its settings.
        wrong(f"{_HPO} +algorithm.hpo.alpa=0.5", "Remove it; the settings are alpha", right=_HPO),
        wrong(f"{_HPO} +algorithm.hpo.Alpha=0.5", "Remove it; the settings are alpha", right=_HPO),
        *(
            wrong(f"{_HPO} +algorithm.hpo.alpha={typed}", _RANGE, (f"algorithm.hpo.alpha={shown}",), right)
            for typed, shown, right in (
                ("1.5", "1.5", f"{_HPO} +algorithm.hpo.alpha=1"),
                ("-0.1", "-0.1", f"{_HPO} +algorithm.hpo.alpha=0"),
                ("nan", "nan", _HPO),
                ("inf", "inf", _HPO),
                ("'\"0,6\"'", "'0,6'", f"{_HPO} +algorithm.hpo.alpha=0.6"),
                ("60%", "'60%'", f"{_HPO} +algorithm.hpo.alpha=0.6"),
                ("true", "True", _HPO),
                ("null", "None", _HPO),
                ("[0.6]", "[0.6]", _HPO),
            )
        ),
        wrong(f"{_HPO} +algorithm.hpo=0.5", "must be a mapping with the keys alpha", right=_HPO),
        wrong(
            f"{_HPO} +algorithm.hpo.alpha=0.6 +algorithm.hpo.alpha=0.5",
            "Either remove + prefix",
            right=f"{_HPO} +algorithm.hpo.alpha=0.5",
        ),
        wrong(f"{_HPO} algorithm.hpo.alpha=0.5", "To append to your config use +algorithm.hpo.alpha=0.5"),
        wrong(f"{_HPO} +algorithm.alpha=0.5", "set algorithm.hpo.alpha", right=f"{_HPO} +algorithm.hpo.alpha=0.5"),
        wrong(f"{_HPO} +algorithm.hpo_alpha=0.5", "set algorithm.hpo.alpha"),
        wrong(f"{_HPO} +hpo.alpha=0.5", "set algorithm.hpo.alpha"),
        wrong(f"{_HPO} +{_ACTOR}.policy_loss.alpha=0.5", "set algorithm.hpo.alpha"),
        wrong(f"{_AHPO} +algorithm.alpha_min=0.2", "set algorithm.hpo.alpha_min"),
        wrong(f"{_AHPO} +algorithm.hpo.alpha_min=1.5", _RANGE, right=f"{_AHPO} +algorithm.hpo.alpha_min=1"),
        wrong(f"{_AHPO} +algorithm.hpo.alpha_max=0.5", "Remove it; the settings are alpha", right=_AHPO),
        wrong(
            f"{_AHPO} +algorithm.hpo.alpha=0.5", "Remove it, or select hpo", right=f"{_HPO} +algorithm.hpo.alpha=0.5"
        ),
        wrong(f"{_AHPO} +algorithm.hpo.alpha=0.6", "Remove it, or select hpo", right=_AHPO),
        wrong(f"{_HPO} +algorithm.hpo.alpha_min=0.2", "Remove it, or select ahpo", right=_HPO),
        wrong("+algorithm.policy_loss=grpo +algorithm.hpo.alpha=0.5", "Remove it, or select hpo"),
        wrong(f"{_ADV}=grpo +algorithm.hpo.alpha=0.6", "Remove it, or select hpo", right=f"{_ADV}=hpo"),
        # The base estimator.
        wrong(f"{_AHPO} +algorithm.hpo.base_estimator=rlo", "Set one of grpo, rloo"),
        wrong(f"{_AHPO} +algorithm.hpo.base_estimator=gae", "Set one of grpo, rloo"),
        wrong("+algorithm.policy_loss=grpo +algorithm.hpo.base_estimator=rloo", f"Remove it, or set {_ADV} to one of"),
        # Settings that contradict each other.
        wrong(f"{_AHPO} {_ADV}=rloo", f"Remove {_ADV}=rloo", right=f"{_ADV}=rloo {_LOSS}=ahpo"),
        wrong(f"{_AHPO} {_ADV}=hpo", f"Remove {_ADV}=hpo", right=_AHPO),
        wrong(f"{_AHPO} {_LOSS}=gspo", f"Remove {_LOSS}=gspo", right=f"{_ADV}=ahpo {_LOSS}=gspo"),
        wrong(f"{_AHPO} +algorithm.loss_mode=hpo", "Remove it", right=_AHPO),
        wrong(f"+algorithm.policy_loss=gspo {_ADV}=ahpo", f"Remove {_ADV}=ahpo", right=f"{_ADV}=ahpo {_LOSS}=gspo"),
        wrong(
            f"{_ADV}=ahpo {_LOSS}=hpo",
            "Set both to ahpo",
            (f"{_ADV}=ahpo", f"{_LOSS}=hpo"),
            f"{_ADV}=ahpo {_LOSS}=ahpo",
        ),
        wrong(
            f"{_ADV}=gae {_LOSS}=hpo", f"Set {_ADV} to hpo", (f"{_ADV}=gae", f"{_LOSS}=hpo"), f"{_ADV}=hpo {_LOSS}=hpo"
        ),
        wrong(f"{_ADV}=ahpo {_LOSS}=kl_cov", f"Set {_LOSS} to ahpo", right=f"{_ADV}=ahpo {_LOSS}=ahpo"),
        wrong(f"{_AHPO} +{_ACTOR}.policy_loss.adv_estimator=hpo", "Remove it", right=_AHPO),
        wrong(
            f"{_AHPO} {_ACTOR}.policy_loss._target_=mine.Loss",
            "Set it to hpo_plugin.verl.config.HPOPolicyLossConfig",
            right=f"{_AHPO} {_ACTOR}.policy_loss._target_=hpo_plugin.verl.config.HPOPolicyLossConfig",
        ),
        # The normalization.
        wrong(f"{_AHPO} {_AGG}=seq-mean-token-mean", f"Remove {_AGG}=seq-mean-token-mean", right=_AHPO),
        wrong(
            f"{_ADV}=ahpo {_LOSS}=ahpo {_AGG}=token-sum", f"Set {_AGG}=token-mean", right=f"{_ADV}=ahpo {_LOSS}=ahpo"
        ),
        *(
            wrong(
                f"{_AHPO} algorithm.norm_adv_by_std_in_grpo={typed}",
                "Set algorithm.norm_adv_by_std_in_grpo=true or",
                (f"algorithm.norm_adv_by_std_in_grpo={shown}",),
                f"{_AHPO} algorithm.norm_adv_by_std_in_grpo=false",
            )
            for typed, shown in (("no", "'no'"), ("flase", "'flase'"), ("null", "None"), ("0", "0"))
        ),
        wrong(
            f"{_AHPO} +algorithm.norm_adv_by_std=false",
            "Set algorithm.norm_adv_by_std_in_grpo",
            ("algorithm.norm_adv_by_std=False",),
        ),
        # The clip range.
        wrong(
            f"{_AHPO} {_ACTOR}.clip_ratio_high=-1",
            "Set a number of 0 or more",
            right=f"{_AHPO} {_ACTOR}.clip_ratio_high=0.28",
        ),
        wrong(f"{_AHPO} {_ACTOR}.clip_ratio_low=low", "Set a number of 0 or more", (f"{_ACTOR}.clip_ratio_low='low'",)),
        wrong(
            f"{_AHPO} {_ACTOR}.clip_ratio=0.3",
            f"set {_ACTOR}.clip_ratio_low and",
            right=f"{_AHPO} {_ACTOR}.clip_ratio_low=0.3 {_ACTOR}.clip_ratio_high=0.3",
        ),
        # The group.
        wrong(f"{_AHPO} {_ROLLOUT}.n=1", f"Set {_ROLLOUT}.n to 2 or more", right=f"{_AHPO} {_ROLLOUT}.n=2"),
        *(
            wrong(f"{_AHPO} {_ROLLOUT}.n={typed}", f"Set {_ROLLOUT}.n to an integer", (f"{_ROLLOUT}.n={shown}",))
            for typed, shown in (("0", "0"), ("1.5", "1.5"), ("eight", "'eight'"), ("null", "None"))
        ),
        # The trainer.
        wrong(
            f"{_AHPO} trainer.use_v1=False algorithm.use_kl_in_reward=True",
            f"Set algorithm.use_kl_in_reward=False and {_ACTOR}.use_kl_loss=True",
        ),
        wrong(
            f"{_AHPO} {_ROLLOUT}.calculate_log_probs=False {_CORRECTION}.bypass_mode=True",
            f"Set {_ROLLOUT}.calculate_log_probs=True",
            right=f"{_AHPO} {_CORRECTION}.bypass_mode=True",
        ),
        wrong(
            f"{_AHPO} {_CORRECTION}.bypass_mode=True {_CORRECTION}.rollout_rs=token",
            f"Remove it, set {_CORRECTION}.bypass_mode=False",
            right=f"{_AHPO} {_CORRECTION}.rollout_rs=token",
        ),
        wrong(
            f"{_AHPO} {_CORRECTION}.loss_type=reinforce",
            f"set {_LOSS}=bypass_mode",
            right=f"{_ADV}=ahpo {_LOSS}=bypass_mode {_CORRECTION}.loss_type=reinforce",
        ),
        # Observed runs.
        wrong(
            f"{_ADV}=grpo +algorithm.hpo.observe=maybe",
            "Set algorithm.hpo.observe=true",
            ("algorithm.hpo.observe='maybe'",),
            f"{_ADV}=grpo +algorithm.hpo.observe=true",
        ),
        wrong(
            f"{_ADV}=grpo +algorithm.hpo.observed=true", "Remove it; the settings are", ("algorithm.hpo.observed=True",)
        ),
        wrong(f"{_ADV}=grpo +algorithm.hpo.observe=true {_ROLLOUT}.n=1", f"Set {_ROLLOUT}.n to 2 or more"),
        # Sizes.
        wrong(
            f"{_AHPO} {_ACTOR}.ppo_mini_batch_size=128",
            f"Set {_ACTOR}.ppo_mini_batch_size to 64 or less",
            ("data.train_batch_size=64", f"{_ACTOR}.ppo_mini_batch_size=128"),
            f"{_AHPO} {_ACTOR}.ppo_mini_batch_size=64",
        ),
        wrong(
            f"{_AHPO} {_ROLLOUT}.n=5 {_ACTOR}.ppo_mini_batch_size=4",
            "Use fewer GPUs, so that the number of ranks divides 20",
            ("trainer.n_gpus_per_node=8", f"{_ACTOR}.ppo_mini_batch_size=4", f"{_ROLLOUT}.n=5"),
            f"{_AHPO} {_ROLLOUT}.n=5 {_ACTOR}.ppo_mini_batch_size=4 trainer.n_gpus_per_node=4",
        ),
        wrong(
            f"{_AHPO} {_ROLLOUT}.tensor_model_parallel_size=16",
            "Set a size that divides 8",
            right=f"{_AHPO} {_ROLLOUT}.tensor_model_parallel_size=8",
        ),
        wrong(f"{_AHPO} trainer.n_gpus_per_node=0", "to an integer of 1 or more"),
        wrong(f"{_AHPO} trainer.nnodes=two", "to an integer of 1 or more", ("trainer.nnodes='two'",)),
    )


#: verl's Megatron config: the keys that only it has, and the other way through the same checks.
_MEGATRON = functools.partial(Wrong, "ppo_megatron_trainer")
_OURS = functools.partial(Wrong, "hpo_trainer")
_RECIPE = functools.partial(Wrong, "hpo_recipe")
_CPU = functools.partial(Wrong, "countdown_cpu", environment={"VERL_PLATFORM": "cpu"})
_CHECK = functools.partial(Wrong, CHECK)
_LAUNCH = functools.partial(Wrong, "hpo-plugin launch")
_STUDY = functools.partial(Wrong, "hpo-plugin study")
_TRL = functools.partial(Wrong, "HPOConfig")
_OPENRLHF = functools.partial(Wrong, "hpo_plugin.openrlhf")

ROWS: tuple[Wrong, ...] = (
    *_stock("ppo_trainer"),
    _MEGATRON("+algorithm.policy_loss=a_hpo", "Choose one of: grpo", right=_AHPO),
    _MEGATRON(f"{_HPO} +algorithm.hpo.alpha=1.01", _RANGE, right=f"{_HPO} +algorithm.hpo.alpha=1.0"),
    _MEGATRON(
        f"{_ADV}=hpo {_LOSS}=ahpo", "Set both to hpo", (f"{_ADV}=hpo", f"{_LOSS}=ahpo"), f"{_ADV}=hpo {_LOSS}=hpo"
    ),
    _MEGATRON(f"{_AHPO} {_ROLLOUT}.n=1", f"Set {_ROLLOUT}.n to 2 or more", right=_AHPO),
    _MEGATRON(
        f"{_AHPO} {_ACTOR}.megatron.tensor_model_parallel_size=3",
        "Use a multiple of 3 GPUs",
        ("trainer.n_gpus_per_node=8", "tensor 3"),
        f"{_AHPO} {_ACTOR}.megatron.tensor_model_parallel_size=4",
    ),
    _MEGATRON(
        f"{_AHPO} {_ACTOR}.megatron.pipeline_model_parallel_size=two",
        "to an integer of 1 or more",
        (f"{_ACTOR}.megatron.pipeline_model_parallel_size='two'",),
    ),
    _OURS("algorithm.policy_loss=HPO", "Choose one of: grpo", right="algorithm.policy_loss=hpo"),
    _OURS("algorithm.policy_loss=null", "Choose one of: grpo", right="algorithm.policy_loss=grpo"),
    _OURS("+algorithm.policy_loss=hpo", "Either remove + prefix", right="algorithm.policy_loss=hpo"),
    _OURS(
        "algorithm.policy_loss=hpo algorithm.hpo.alpha=2",
        _RANGE,
        right="algorithm.policy_loss=hpo algorithm.hpo.alpha=1",
    ),
    _OURS("algorithm.policy_loss=hpo +algorithm.hpo.alfa=0.5", "Remove it; the settings are"),
    _OURS(
        "algorithm.hpo.alpha=0.5", "Remove it, or select hpo", right="algorithm.hpo.alpha=0.5 algorithm.policy_loss=hpo"
    ),
    _OURS("algorithm.policy_loss=hpo algorithm.hpo.alpha_min=0.5", "Remove it, or select ahpo"),
    _OURS(f"{_ADV}=hpo", "Set both to hpo", (f"{_ADV}=hpo", f"{_LOSS}=ahpo"), "algorithm.policy_loss=hpo"),
    _OURS(f"{_ADV}=gae", f"Set {_ADV} to ahpo"),
    _OURS(f"{_LOSS}=hpo", "Set both to ahpo", right="algorithm.policy_loss=hpo"),
    _OURS(f"{_ACTOR}.policy_loss.adv_estimator=grpo", "Remove it", right=""),
    _OURS(f"{_AGG}=seq-mean-token-sum", f"Set {_AGG}=token-mean", right=""),
    _OURS("algorithm.norm_adv_by_std_in_grpo=off", "=true or", ("algorithm.norm_adv_by_std_in_grpo='off'",)),
    _OURS(
        "policy_loss_presets.ahpo.loss_agg_mode=seq-mean-token-mean",
        f"Set {_AGG}=token-mean",
        (f"{_AGG}=seq-mean-token-mean",),
    ),
    _RECIPE("algorithm.policy_loss=ahpo2", "Choose one of: grpo", right="algorithm.policy_loss=ahpo"),
    _RECIPE("hpo/model=qwen", "Available options in 'hpo/model'", ("hpo/model/qwen",), "hpo/model=qwen2.5-7b"),
    _RECIPE("hpo/cluster=3x8", "Available options in 'hpo/cluster'", ("hpo/cluster/3x8",), "hpo/cluster=2x8"),
    _RECIPE("hpo/cluster=64x8", "Use fewer GPUs", ("trainer.nnodes=64", "rollout.n=8"), "hpo/cluster=8x8"),
    _RECIPE(
        "hpo/engine=megatron recipe.megatron.tensor_model_parallel_size=3",
        "Use a multiple of 3 GPUs",
        ("trainer.n_gpus_per_node=8", "tensor 3"),
        "hpo/engine=megatron recipe.megatron.tensor_model_parallel_size=2",
    ),
    _RECIPE(
        f"{_ROLLOUT}.tensor_model_parallel_size=8",
        "Set a divisor of 2",
        right=f"{_ROLLOUT}.tensor_model_parallel_size=2",
    ),
    _RECIPE("data.train_batch_size=100", f"Set {_ACTOR}.ppo_mini_batch_size to 50"),
    _RECIPE(
        f"{_ACTOR}.ppo_mini_batch_size=7",
        f"Set {_ACTOR}.ppo_mini_batch_size to 8",
        right=f"{_ACTOR}.ppo_mini_batch_size=8",
    ),
    _RECIPE("trainer.nnodes=0", "to an integer of 1 or more", right="trainer.nnodes=1"),
    _RECIPE("data.max_response_length=20000", f"Set {_ACTOR}.ppo_max_token_len_per_gpu to"),
    _RECIPE(
        f"hpo/engine=torchtitan {_ACTOR}.torchtitan.data_parallel_shard_size=3",
        "their product is 8",
        ("data_parallel_shard_size=3",),
    ),
    _RECIPE("+recipe.offlod=True", "Set recipe.offload", right="recipe.offload=True"),
    _RECIPE(
        "recipe.offload=maybe", "Set recipe.offload=true or false", ("recipe.offload='maybe'",), "recipe.offload=true"
    ),
    _CPU(f"{_ACTOR}.strategy=fsdp", f"Set {_ACTOR}.strategy=fsdp2"),
    _CPU("ray_kwargs.ray_init.num_cpus=2", "Set ray_kwargs.ray_init.num_cpus="),
    _CPU("trainer.n_gpus_per_node=2 ray_kwargs.ray_init.num_gpus=1", "Set ray_kwargs.ray_init.num_gpus=2"),
    _CPU("algorithm.policy_loss=a_hpo", "Choose one of: grpo"),
    Wrong(
        "telelogs_cpu",
        "actor_rollout_ref.model.lora_rank=8",
        "Set actor_rollout_ref.model.lora.merge=True",
        environment={"VERL_PLATFORM": "cpu"},
    ),
    _CHECK("--config-name=hpo_trianer", "correct the name or the override", ("hpo_trianer",)),
    _CHECK("algorithm.policy_los=hpo", "correct the name or the override", right="algorithm.policy_loss=hpo"),
    _CHECK("--config-dir={work}/nowhere", "set --config-dir to an existing directory", ("--config-dir=", "nowhere")),
    _CHECK("recipe/task=telelogs", "use the new names", ("recipe/task=telelogs is now hpo/task=telelogs",)),
    _CHECK(
        "data.train_files={work}/nowhere.parquet", "correct data.train_files", ("nowhere.parquet does not exist",), ""
    ),
    _CHECK("data.val_files={work}", "correct data.val_files", ("is not a file",)),
    _CHECK(
        "data.train_files={work}/reward.parquet", "correct data.train_files", ("reward.parquet is not a parquet file",)
    ),
    _CHECK("data.train_batch_size=4096", "set a smaller data.train_batch_size", right="data.train_batch_size=32"),
    _CHECK("data.prompt_key=question", "write all columns", ("no column question (data.prompt_key)",)),
    _CHECK(
        "actor_rollout_ref.model.path={work}/nowhere",
        "set actor_rollout_ref.model.path",
        ("nowhere has no config.json",),
    ),
    _CHECK(
        "reward.custom_reward_function.path={work}/nowhere.py",
        "correct reward.custom_reward_function.path",
        ("nowhere.py",),
    ),
    _CHECK(
        "reward.custom_reward_function.name=score",
        "reward.custom_reward_function.name",
        ("reward.py:score cannot be loaded",),
    ),
    _CHECK(
        "reward.custom_reward_function.name=raises",
        "correct reward.custom_reward_function",
        ("reward.py:raises raises KeyError",),
    ),
    _CHECK(
        "reward.custom_reward_function.name=not_a_number",
        "correct reward.custom_reward_function",
        ("reward.py:not_a_number returns nan",),
    ),
    _CHECK(
        "reward.custom_reward_function.path=null",
        "set reward.custom_reward_function.path",
        ("verl's reward function by data_source",),
    ),
    _CHECK(f"{_ADV}=ahp0", f"Set {_ADV} to one of", right=""),
    _CHECK(
        "algorithm.policy_loss=hpo algorithm.hpo.alpha=1.2",
        _RANGE,
        right="algorithm.policy_loss=hpo algorithm.hpo.alpha=0.2",
    ),
    # In processes of their own: the installation.
    _OURS(
        "",
        "VERL_USE_EXTERNAL_PLUGINS must not exclude hpo",
        ("'ahpo' of hpo_plugin is not registered",),
        environment={"VERL_USE_EXTERNAL_PLUGINS": "none"},
    ),
    _CHECK(
        "",
        "unset it, or add hpo",
        ("VERL_USE_EXTERNAL_PLUGINS=none",),
        environment={"VERL_USE_EXTERNAL_PLUGINS": "none"},
    ),
    _CHECK("", "pip install 'ray", ("1.0, but",), environment={"PYTHONPATH": "{work}/old"}),
    _LAUNCH("--run-dir {work}/run --config-name hpo_trainer", "Set RAY_ADDRESS", ("ray_kwargs.ray_init.address=",)),
    _LAUNCH("--run-dir {work}/run --config-name hpo_trainer trainer.resume_mode=disable", "Remove the override"),
    _LAUNCH("--run-dir {work}/run --config-name hpo_trainer algorithm.policy_loss=HPO", "Choose one of: grpo"),
    _LAUNCH("--run-dir {work}/run --config-name hpo_trianer", "correct the name", ("hpo_trianer",)),
    _LAUNCH(
        "--run-dir {work}/run --config-name hpo_trainer +ray_kwargs.ray_init.address=auto "
        "trainer.max_actor_ckpt_to_keep=1",
        "set trainer.max_actor_ckpt_to_keep=2 or more",
    ),
    Wrong("hpo-plugin quickstart", "--policy-loss HPO", "Choose one of: grpo", ("--policy-loss", "'HPO'")),
    Wrong("hpo-plugin quickstart", "--task contdown", "countdown", ("--task", "contdown")),
    Wrong("hpo-plugin quickstart", "--rollout vlm", "'hf', 'vllm'", ("--rollout", "'vlm'")),
    Wrong(
        "hpo-plugin preview",
        "{work}/rollouts.jsonl --output {work}/preview --reward scor",
        "its columns are",
        ("'scor'",),
    ),
    Wrong(
        "hpo-plugin preview",
        "{work}/rollouts.jsonl --output {work}/preview --reward score=x",
        "write NAME=WEIGHT",
        ("--reward score=x",),
    ),
    Wrong("hpo-plugin prepare", "countdwn --output {work}/data", "countdown", ("countdwn",)),
    _STUDY("steps=0", "must be at least 1"),
    _STUDY("trainer=slurm", "is not one of verl, simulator", ("trainer='slurm'",)),
    _STUDY(
        "arms.hpo.overrides=[algorithm.policy_loss=hpo,algorithm.hpo.alpha=0.5,algorithm.hpo.alpha=0.6]",
        "set each key in one place",
        ("algorithm.hpo.alpha=0.6", "algorithm.hpo.alpha=0.5"),
    ),
    _STUDY("overrides=[data.seed=3]", "use experiments.<name>.seeds", ("data.seed=3",)),
    _STUDY("experiments.one.arms=[hop]", "is not one of the arms: hpo", ("experiments.one.arms", "'hop'")),
    _STUDY("scores.final_evaluations=5", "lower one of the two"),
    _TRL("--policy grpo", "Set policy to one of 'hpo', 'ahpo'", ("policy='grpo'",), "--policy hpo"),
    _TRL("--policy hpo --alpha 1.5", _RANGE, ("alpha=1.5",), "--policy hpo --alpha 1"),
    _TRL("--policy hpo --alpha -0.1", _RANGE, ("alpha=-0.1",), "--policy hpo --alpha 0"),
    _TRL("--policy hpo --alpha nan", _RANGE, ("alpha=nan",), "--policy hpo"),
    _TRL("--alpha 0.5", "Remove it, or set policy='hpo'", ("alpha=0.5",), "--policy hpo --alpha 0.5"),
    _TRL("--policy hpo --alpha_min 0.2", "Remove it, or set policy='ahpo'", ("alpha_min=0.2",), "--alpha_min 0.2"),
    _TRL("--alpha_min 2", _RANGE, ("alpha_min=2.0",), "--alpha_min 1"),
    _TRL("--loss_type grpo", "Set loss_type='dapo'", ("loss_type='grpo'",), "--loss_type dapo"),
    _TRL(
        "--importance_sampling_level sequence",
        "Set importance_sampling_level='token'",
        ("importance_sampling_level='sequence'",),
        "",
    ),
    _TRL("--observe --policy hpo", "Remove one of the two", ("policy='hpo'", "observe=True"), "--observe"),
    _TRL("--num_generations 1", "Set num_generations to 2 or more", ("num_generations=1",), "--num_generations 2"),
    _OPENRLHF("--hpo.policy grpo", "Set --hpo.policy to one of 'hpo', 'ahpo'", ("--hpo.policy='grpo'",)),
    _OPENRLHF("--hpo.policy hpo --hpo.alpha 1.5", _RANGE, ("--hpo.alpha=1.5",)),
    _OPENRLHF("--hpo.policy hpo --hpo.alpha nan", _RANGE, ("--hpo.alpha=nan",)),
    _OPENRLHF("--hpo.alpha_min -1", _RANGE, ("--hpo.alpha_min=-1.0",)),
    _OPENRLHF("--hpo.alpha 0.5", "Remove it, or set --hpo.policy='hpo'", ("--hpo.alpha=0.5",)),
)


def make_inputs(work: Path) -> None:
    """Write the files that the commands name."""
    from hpo_plugin.tasks.countdown.dataset import prepare_countdown
    from hpo_plugin.tasks.countdown.problems import CountdownConfig

    problems = CountdownConfig(counts=(3,), max_number=12)
    prepare_countdown(work, config=problems, layout="terse", train_size=64, test_size=8)
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (work / "reward.py").write_text(
        "def compute_score(**_):\n    return 0.0\n\n\n"
        "def raises(**_):\n    raise KeyError('label')\n\n\n"
        "def not_a_number(**_):\n    return float('nan')\n"
    )
    (work / "reward.parquet").write_text("not parquet")
    rows = [{"input": "1 2", "output": "3", "score": float(i % 2), "step": 1} for i in range(4)]
    (work / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    old = work / "old" / "ray-1.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 1.0\n")


def complaints(row: Wrong, said: str) -> list[str]:
    """What an error lacks: the key with its value, or the remedy."""
    plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said).split())
    return [f"{row.name}: the error lacks {part!r}" for part in (*row.named, row.remedy) if part not in plain]


def run_commands(rows: Sequence[Wrong], work: Path) -> Result:
    """Run the commands of rows, each in a process of its own."""
    make_inputs(work)
    result = Result()
    for row in rows:
        environment = {
            name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "VERL_PLATFORM")
        }
        given = {name: value.replace("{work}", str(work)) for name, value in row.environment.items()}
        paths = [given.pop("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment |= {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "COLUMNS": "1000",
            "TERMINAL_WIDTH": "1000",
            **given,
        }
        begin = time.monotonic()
        try:
            done = subprocess.run(
                argv(row, work), env=environment, cwd=work, capture_output=True, text=True, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            result.failures.append(f"{row.name}: not ended after {LIMIT:g} s")
            continue
        said = done.stdout + done.stderr
        result.inputs += 1
        result.measure("slowest command (s)", time.monotonic() - begin)
        result.failures += complaints(row, said)
        if done.returncode == 0:
            result.failures.append(f"{row.name}: exit status 0")
        if RAY_STARTS in said:
            result.failures.append(f"{row.name}: Ray was started")
    return result


def table() -> str:
    """The rows as Markdown."""
    lines = ["| config or command | setting | the error names | the error says |", "|---|---|---|---|"]
    for row in ROWS:
        variables = [f"{name}={value}" for name, value in row.environment.items() if name != "VERL_PLATFORM"]
        typed = " ".join([*variables, row.words]).strip().replace("{work}/", "").replace("{work}", "DIR")
        named = ", ".join(f"`{part}`" for part in row.named)
        lines.append(f"| `{row.command}` | `{typed}` | {named} | `{row.remedy}` |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the table of the rows written anew."""
    return re.sub(
        r"<!-- wrong settings -->\n.*?<!-- end of wrong settings -->",
        lambda _: f"<!-- wrong settings -->\n\n{table()}\n\n<!-- end of wrong settings -->",
        text,
        flags=re.DOTALL,
    )


def _cases() -> dict[str, Callable[[Path], Result]]:
    commands = dict.fromkeys(row.command for row in ROWS)
    return {
        re.sub(r"[^a-zA-Z0-9_]", "-", command): functools.partial(
            run_commands, [row for row in ROWS if row.command == command]
        )
        for command in commands
    }


PROBES = (
    Probe(
        name="wrong-settings",
        section="wrong-settings",
        title="commands with a wrong setting",
        expected="the command ends before Ray starts; the error names key, value and remedy",
        cases=_cases(),
        limit=4 * 3600.0,
    ),
)

if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
