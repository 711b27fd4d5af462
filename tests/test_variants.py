"""The table of algorithms: one entry is all that an algorithm needs."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from hpo_plugin import variants
from hpo_plugin.algorithm import SignCounts, hysteretic_advantage
from hpo_plugin.variants import VARIANTS, Variant, VariantSetting, on_registration, register_variant, settings


@pytest.fixture(autouse=True)
def table_restored(monkeypatch):
    """What a test registers is gone after it, and no adapter hears of it."""
    before = dict(VARIANTS)
    monkeypatch.setattr(variants, "_listeners", [])
    yield
    VARIANTS.clear()
    VARIANTS.update(before)


def sqrt_alpha(counts: SignCounts, values: Any) -> torch.Tensor:
    return (counts.positive / counts.negative.clamp(min=1)).sqrt().clamp(values["alpha_min"], 1.0)


SQRT = Variant("sqrt_hpo", "√-HPO", "α = √(p̂⁺ / p̂⁻)", sqrt_alpha, VARIANTS["ahpo"].settings)


def test_the_paper_has_two_with_one_setting_each():
    assert {name: (v.title, [s.name for s in v.settings]) for name, v in VARIANTS.items()} == {
        "hpo": ("HPO", ["alpha"]),
        "ahpo": ("A-HPO", ["alpha_min"]),
    }
    assert {s.name: (s.default, s.low, s.high) for s in settings().values()} == {
        "alpha": (0.6, 0.0, 1.0),
        "alpha_min": (0.1, 0.0, 1.0),
    }


def test_the_rules_of_the_paper():
    counts = SignCounts(torch.tensor(1), torch.tensor(4), torch.tensor(9))
    assert VARIANTS["hpo"].alpha(counts, {"alpha": 0.3}) == 0.3
    assert VARIANTS["ahpo"].alpha(counts, {"alpha_min": 0.1}) == 0.25
    assert VARIANTS["ahpo"].alpha(counts, {"alpha_min": 0.5}) == 0.5


def test_a_variant_is_described_with_its_settings():
    values = {"alpha": 0.6, "alpha_min": 0.2}
    assert VARIANTS["hpo"].describe(values) == "HPO: fixed α, alpha = 0.6"
    assert VARIANTS["ahpo"].describe(values) == "A-HPO: α = clip(p̂⁺ / p̂⁻, α_min, 1), alpha_min = 0.2"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_can_be_pickled(name):
    assert pickle.loads(pickle.dumps(VARIANTS[name])) == VARIANTS[name]


def test_every_default_is_within_its_bounds_and_every_setting_is_described():
    for setting in settings().values():
        assert setting.low <= setting.default <= setting.high
        assert setting.description


@pytest.mark.parametrize(("alpha_min", "alpha"), [(0.1, 0.5), (0.75, 0.75)])
def test_a_new_variant_is_one_entry(alpha_min, alpha):
    """1 positive, 4 negative: α = √(1/4), or its lower limit."""
    register_variant(SQRT)
    values = {"alpha_min": alpha_min}
    result = hysteretic_advantage(
        torch.tensor([1.0, 0, 0, 0, 0]),
        torch.zeros(5, dtype=torch.long),
        lambda counts: VARIANTS["sqrt_hpo"].alpha(counts, values),
        normalize_by_std=False,
    )
    assert result.alpha.item() == alpha
    torch.testing.assert_close(result.weighted, torch.tensor([0.8] + [-0.2 * alpha] * 4))
    assert VARIANTS["sqrt_hpo"].describe(values) == f"√-HPO: α = √(p̂⁺ / p̂⁻), alpha_min = {alpha_min}"
    assert set(settings()) == {"alpha", "alpha_min"}


def test_the_same_entry_may_be_registered_twice():
    assert register_variant(SQRT) is SQRT
    assert register_variant(replace(SQRT)) == SQRT
    assert list(VARIANTS) == ["hpo", "ahpo", "sqrt_hpo"]


def test_an_adapter_hears_of_what_is_registered_and_of_nothing_that_is_refused():
    heard: list[set[str]] = []
    on_registration(lambda: heard.append(set(VARIANTS)))
    register_variant(SQRT)
    with pytest.raises(ValueError, match="already registered"):
        register_variant(replace(SQRT, title="another"))
    assert heard == [{"hpo", "ahpo", "sqrt_hpo"}]


def test_a_name_that_is_taken_and_a_setting_that_is_defined_otherwise_are_refused():
    with pytest.raises(ValueError, match="the variant 'ahpo' is already registered"):
        register_variant(replace(SQRT, name="ahpo"))
    with pytest.raises(ValueError, match="the setting 'alpha_min' of 'sqrt_hpo' differs"):
        register_variant(replace(SQRT, settings=(VariantSetting("alpha_min", 0.5, "another"),)))
    assert set(VARIANTS) == {"hpo", "ahpo"}
