"""What ``HPOConfig`` accepts, and what it says of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

pytest.importorskip("trl", minversion="1.10", exc_type=ImportError, reason="TRL is not installed (make test-trl)")

from trl import GRPOConfig, TrlParser

from hpo_plugin.errors import ConfigError
from hpo_plugin.trl import HPOConfig


def config(**changes):
    return HPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[], **changes)


def test_the_defaults_are_ahpo_over_trls_defaults():
    ours, plain = config(), GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[])
    assert (ours.policy, ours.settings_of_policy()) == ("ahpo", {"alpha": 0.6, "alpha_min": 0.1})
    assert (ours.loss_type, ours.scale_rewards, ours.epsilon) == (plain.loss_type, plain.scale_rewards, plain.epsilon)


@pytest.mark.parametrize("setting", [{"alpha": 0}, {"alpha": 1}, {"alpha": 0.25}])
def test_bounds_are_inclusive(setting):
    assert config(policy="hpo", **setting).settings_of_policy()["alpha"] == setting["alpha"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": "grpo"}, r"policy='grpo' is not a variant\. Set policy to one of 'hpo', 'ahpo'"),
        ({"policy": "hpo", "alpha": 1.5}, r"alpha=1.5 is not a number in \[0, 1\]"),
        ({"policy": "hpo", "alpha": -0.1}, r"alpha=-0.1 is not a number in \[0, 1\]"),
        ({"policy": "hpo", "alpha": float("nan")}, r"alpha=nan is not a number in \[0, 1\]"),
        ({"policy": "hpo", "alpha": "0.5"}, r"alpha='0.5' is not a number"),
        ({"policy": "hpo", "alpha": True}, r"alpha=True is not a number"),
        ({"alpha_min": 2}, r"alpha_min=2 is not a number in \[0, 1\]"),
        ({"alpha": 0.5}, r"alpha=0.5 has no effect with policy='ahpo': it is a setting of policy='hpo'"),
        ({"policy": "hpo", "alpha_min": 0.2}, r"alpha_min=0.2 has no effect with policy='hpo'"),
        ({"loss_type": "grpo"}, r"loss_type='grpo' is not HPO's.*loss_type='dapo'"),
        ({"loss_type": "bnpo"}, r"loss_type='bnpo'"),
        ({"loss_type": "dr_grpo"}, r"loss_type='dr_grpo'"),
        ({"importance_sampling_level": "sequence"}, r"importance_sampling_level='sequence'.*'token'"),
        ({"observe": True, "policy": "hpo"}, r"policy='hpo' has no effect with observe=True.*Remove one of the two"),
        ({"observe": True, "alpha": 0.5}, r"alpha=0.5 has no effect with policy='ahpo'"),
        ({"observe": True, "alpha_min": 2}, r"alpha_min=2 is not a number in \[0, 1\]"),
        ({"observe": "yes"}, r"observe='yes' must be True or False"),
    ],
)
def test_what_would_not_be_hpo_is_refused_with_what_to_do(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(**changes)


@pytest.mark.parametrize("loss", [{"loss_type": "grpo"}, {"importance_sampling_level": "sequence"}])
def test_grpo_with_any_loss_may_be_observed(loss):
    assert config(observe=True, alpha_min=0.2, **loss).settings_of_policy()["alpha_min"] == 0.2


def test_trls_parser_reads_the_settings_from_yaml_and_the_command_line(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("policy: hpo\nalpha: 0.3\noutput_dir: unused\nuse_cpu: true\nbf16: false\nreport_to: none\n")
    parser = TrlParser(HPOConfig)
    (parsed,) = parser.parse_args_and_config(["--config", str(file)])
    assert (parsed.policy, parsed.settings_of_policy()["alpha"]) == ("hpo", 0.3)
    (parsed,) = parser.parse_args_and_config(["--config", str(file), "--alpha", "0.7"])
    assert parsed.alpha == 0.7
    with pytest.raises(ConfigError, match=r"alpha=7\.0 is not a number"):
        parser.parse_args_and_config(["--config", str(file), "--alpha", "7"])
    observed = ["--output_dir", "unused", "--use_cpu", "--bf16", "no", "--observe"]
    assert TrlParser(HPOConfig).parse_args_and_config(observed)[0].observe is True


@pytest.fixture
def registry(monkeypatch):
    from hpo_plugin import variants

    monkeypatch.setattr(variants, "VARIANTS", dict(variants.VARIANTS))
    return variants


def test_a_registered_variant_is_a_policy_and_a_subclass_gives_it_settings(registry):
    power = registry.VariantSetting("power", 2.0, "exponent", high=9.0)
    registry.register_variant(registry.Variant("powered", "P", "α", lambda counts, settings: 0.5, (power,)))
    assert config(policy="powered").settings_of_policy()["power"] == 2.0

    @dataclass
    class WithPower(HPOConfig):
        power: float | None = None

    changed = WithPower(output_dir="unused", use_cpu=True, bf16=False, policy="powered", power=3.0)
    assert changed.settings_of_policy()["power"] == 3.0


def test_a_setting_with_the_name_of_a_field_of_trl_is_refused_where_it_is_selected(registry):
    hot = registry.VariantSetting("temperature", 0.5, "of α")
    registry.register_variant(registry.Variant("hot", "Hot", "α", lambda counts, settings: 0.5, (hot,)))
    assert config().settings_of_policy()["temperature"] == 0.5
    with pytest.raises(
        ConfigError, match="policy='hot' has a setting 'temperature', which is also a field of GRPOConfig"
    ):
        config(policy="hot")


def test_numbers_of_numpy_are_numbers():
    assert config(policy="hpo", alpha=np.float32(0.5)).settings_of_policy()["alpha"] == 0.5
