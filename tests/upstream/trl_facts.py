"""Run with a TRL that has the contribution: its advantages beside the plugin's, on drawn batches, as JSON."""

import inspect
import json
import sys
import types
from collections import defaultdict
from types import SimpleNamespace

import torch
import trl
from trl import GRPOTrainer
from trl.experimental import hpo
from trl.trainer.utils import nanstd

from hpo_plugin.trl import HPOConfig, HPOTrainer

#: Lines of the contributed trainer that are damaged, each in a copy.
FAULTS = {
    "rounding is counted": ("8 * torch.finfo(rewards.dtype).eps * magnitudes", "-1.0 * magnitudes"),
    "masked completions are counted": ("mask.any(dim=1) &", "torch.ones_like(mask[:, 0]).bool() &"),
    "unscorable completions are counted": ("& ~unscorable_mask[process_slice]", ""),
    "rejected sequences are counted": ('output["importance_sampling_ratio"] != 0', "mask > -1"),
    "groups of training in evaluation": ("self.num_generations_eval", "self.num_generations"),
}


def config(**settings):
    """The plugin's."""
    return HPOConfig("unused", use_cpu=True, bf16=False, policy="hpo" if "alpha" in settings else "ahpo", **settings)


#: Settings -> the plugin's config.
CONFIGS = {
    tuple(settings.items()): config(**settings)
    for settings in ({"alpha_min": 0.1}, {"alpha_min": 0.0}, {"alpha": 0.6}, {"alpha": 0.0})
}


def damaged(fault):
    """The contributed trainer with a fault."""
    module = types.ModuleType("trl.experimental.hpo.damaged")
    source = inspect.getsource(hpo.hpo_trainer)
    before, after = FAULTS[fault]
    assert source.count(before) == 1, fault
    module.__package__ = "trl.experimental.hpo"
    exec(source.replace(before, after), module.__dict__)
    return module.HPOTrainer


def draw(generator):
    """The rewards of a generation batch, and what GRPOTrainer makes of them."""

    def choice(*options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    def rows(share):
        return torch.rand(count, generator=generator) < share

    group, functions = choice(2, 4, 7, 8, 16, 64), choice(1, 1, 2)
    count = group * choice(2, 4, 6)
    values = torch.tensor(choice([0.1, 1.0], [0.1, 0.4, 0.7], [0.7], [-3.3, 0.0, 1e3], [0.0, 1.0]))
    rewards = values[torch.randint(len(values), (count, functions), generator=generator)]
    if choice(True, False, False):
        rewards = torch.rand(count, functions, generator=generator)
    rewards[torch.rand(count, functions, generator=generator) < choice(0.0, 0.1)] = torch.nan
    weights = torch.tensor([1.0] if functions == 1 else [choice(1.0, 0.3), choice(1.0, 2.0)])
    aggregation = choice("sum_then_normalize", "sum_then_normalize", "normalize_then_sum")
    unscorable = rewards.isnan().all(dim=1)

    def relative(x):
        x = x.view(-1, group)
        deviation = nanstd(x, dim=1).unsqueeze(1)
        return ((x - x.nanmean(dim=1, keepdim=True)) / (deviation + 1e-4)).flatten()

    if aggregation == "sum_then_normalize":
        advantages = relative((rewards * weights).nansum(dim=1).masked_fill(unscorable, torch.nan))
    else:
        total = torch.stack([relative(column) for column in rewards.unbind(dim=1)], dim=1)
        total = (total * weights).nansum(dim=1).masked_fill(unscorable, torch.nan)
        advantages = (total - total.nanmean()) / (nanstd(total) + 1e-4)
    length = torch.randint(1, 6, (count,), generator=generator).masked_fill(rows(choice(0.0, 0.2)), 0)
    output = {
        "advantages": torch.nan_to_num(advantages, nan=0.0),
        "completion_mask": (torch.arange(5) < length.unsqueeze(1)).int(),
    }
    if choice(True, False):
        output["tool_mask"] = (~rows(0.2)).int().unsqueeze(1).expand(count, 5)
    if choice(True, False):
        # Of sequences, or of tokens, with 1 at the padding as in TRL.
        kept = (~rows(0.2)).float().unsqueeze(1)
        padded = output["completion_mask"] == 0
        output["importance_sampling_ratio"] = choice(kept, kept.expand(count, 5).masked_fill(padded, 1.0))
    trainer = {
        "num_generations": group,
        "num_generations_eval": group,
        "reward_weights": weights,
        "multi_objective_aggregation": aggregation,
    }
    mode = choice("train", "eval")
    trainer["num_generations_eval" if mode == "train" else "num_generations"] = 1
    return rewards, output, trainer, mode, dict(choice(*CONFIGS))


def weighted(trainer_class, rewards, output, attributes, mode, settings):
    """Advantages and metrics of a trainer."""
    trainer = object.__new__(trainer_class)
    trainer.__dict__ |= attributes | {
        "model": SimpleNamespace(training=mode == "train"),
        "args": CONFIGS[tuple(settings.items())],
        "accelerator": SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, process_index=0),
        "alpha": settings.get("alpha"),
        "alpha_min": settings.get("alpha_min"),
        "_metrics": {mode: defaultdict(list)},
    }

    def generate(self, inputs):
        self._calculate_rewards(inputs, None, None, None)
        return dict(output)

    GRPOTrainer._calculate_rewards = lambda *arguments: rewards
    GRPOTrainer._generate_and_score_completions = generate
    found = trainer._generate_and_score_completions([])["advantages"]
    return found, {name: value for name, (value,) in trainer._metrics[mode].items()}


def difference(trainer_class, batches):
    """The largest difference to the plugin, of advantages and of each metric that both have."""
    generator = torch.Generator().manual_seed(0)
    largest = defaultdict(float)
    names = {
        "hpo/alpha": "hpo/alpha",
        "hpo/share_positive": "hpo/frac_positive",
        "hpo/share_negative": "hpo/frac_negative",
    }
    for _ in range(batches):
        batch = draw(generator)
        (expected, logged), (found, own) = weighted(HPOTrainer, *batch), weighted(trainer_class, *batch)
        assert own.keys() == set(names.values())
        largest["advantages"] = max(largest["advantages"], float((found - expected).abs().max()))
        for name, of in names.items():
            largest[name] = max(largest[name], abs(own[of] - logged[name]))
    return largest


torch.set_num_threads(1)
json.dump(
    {
        "trl": trl.__file__,
        "difference": difference(hpo.HPOTrainer, 400),
        "faults": {fault: difference(damaged(fault), 100) for fault in FAULTS},
    },
    sys.stdout,
)
