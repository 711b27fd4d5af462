"""The table of variants. A variant is a rule that computes α from the batch's sign counts, with the rule's settings.

The framework adapters read from this table the names to register, the settings with their bounds and defaults, and the
text to show. One call of :func:`register_variant` adds a variant (``docs/variants.md``). This module imports only
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from hpo_plugin.algorithm import SignCounts, adaptive_alpha
from hpo_plugin.errors import ConfigError

__all__ = ["VARIANTS", "Variant", "VariantSetting", "register_variant", "resolve", "settings"]


@dataclass(frozen=True)
class VariantSetting:
    """A number that a user may set.

    Attributes:
        name: The name in configs: a key of ``algorithm.hpo`` for verl, a field of ``HPOConfig`` for TRL,
            ``--hpo.NAME`` for OpenRLHF, ``hpo_NAME`` for slime.
        default: Value if the config sets none.
        description: What the number is, for error messages.
        low: Smallest value.
        high: Largest value.
    """

    name: str
    default: float
    description: str
    low: float = 0.0
    high: float = 1.0

    def checked(self, value: Any, key: str) -> float:
        """Check a value and return it as a number.

        Args:
            value: The value that the user set.
            key: The key that the user set, for the message.

        Raises:
            ConfigError: The value is not a number, or out of range.
        """
        # `not (low <= value)` also rejects NaN.
        if isinstance(value, bool) or not isinstance(value, Real) or not self.low <= float(value) <= self.high:
            raise ConfigError(
                f"{key}={value!r} is not a number in [{self.low:g}, {self.high:g}] ({self.description}). Set a number "
                f"in [{self.low:g}, {self.high:g}]."
            )
        return float(value)


@dataclass(frozen=True)
class Variant:
    """One algorithm: GRPO's advantages with α on negative ones, and mean-length normalization.

    Attributes:
        name: Name in configs: ``ahpo``.
        title: Name in texts: ``A-HPO``.
        formula: α in one line: ``α = clip(p̂⁺ / p̂⁻, alpha_min, 1)``.
        alpha: The rule. It computes α in [0, 1] from the sign counts of the whole rollout batch and the value of each
            setting. It must be a function of a module, because other processes look it up by name, and have no state.
        settings: Numbers that a user may set.
    """

    name: str
    title: str
    formula: str
    alpha: Callable[[SignCounts, Mapping[str, float]], Tensor | float]
    settings: tuple[VariantSetting, ...] = ()

    def describe(self, values: Mapping[str, float]) -> str:
        """The algorithm with its settings in one line."""
        return f"{self.title}: {self.formula}" + "".join(f", {s.name} = {values[s.name]:g}" for s in self.settings)


#: Every registered variant by name.
VARIANTS: dict[str, Variant] = {}

_listeners: list[Callable[[], None]] = []


def settings() -> dict[str, VariantSetting]:
    """The settings of all variants by name."""
    return {setting.name: setting for variant in VARIANTS.values() for setting in variant.settings}


def resolve(policy: str, given: Mapping[str, Any], *, prefix: str = "") -> tuple[Variant, dict[str, float]]:
    """Return the variant with a name, and the value of each setting.

    Args:
        policy: Name of a variant.
        given: The values that the user set. A setting that is absent or None gets its default.
        prefix: Prefix of the names in messages, as the user writes them: ``--hpo.``

    Returns:
        The variant, and a value for each setting of all variants.

    Raises:
        ConfigError: An unknown policy, a value out of range, or a setting of another policy; the message names the
            setting, its value, and what to do.
    """
    if policy not in VARIANTS:
        names = ", ".join(map(repr, VARIANTS))
        raise ConfigError(f"{prefix}policy={policy!r} is not a variant. Set {prefix}policy to one of {names}.")
    variant, values = VARIANTS[policy], {}
    for name, setting in settings().items():
        value = given.get(name)
        if value is None:
            values[name] = setting.default
            continue
        if setting not in variant.settings:
            others = [other.name for other in VARIANTS.values() if setting in other.settings]
            raise ConfigError(
                f"{prefix}{name}={value} has no effect with {prefix}policy={policy!r}: it is a setting of "
                f"{prefix}policy={others[0]!r}. Remove it, or set {prefix}policy={others[0]!r}."
            )
        values[name] = setting.checked(value, f"{prefix}{name}")
    return variant, values


def register_variant(variant: Variant) -> Variant:
    """Make a variant available under its name in every adapter.

    Args:
        variant: The variant. Variants may share a setting if their definitions of it are equal.

    Returns:
        The same variant.

    Raises:
        ValueError: If another variant has the name, or another variant defines a setting differently.
    """
    if VARIANTS.get(variant.name, variant) != variant:
        raise ValueError(
            f"the variant {variant.name!r} is already registered: {VARIANTS[variant.name]}. Use another name."
        )
    known = settings()
    for setting in variant.settings:
        if known.get(setting.name, setting) != setting:
            raise ValueError(
                f"the setting {setting.name!r} of {variant.name!r} differs from {known[setting.name]}, which another "
                "variant defines. Use the same definition, or another name."
            )
    VARIANTS[variant.name] = variant
    for listener in _listeners:
        listener()
    return variant


def on_registration(listener: Callable[[], None]) -> None:
    """Call ``listener`` after every later :func:`register_variant`, so that an adapter can register the variant."""
    _listeners.append(listener)


def _fixed(counts: SignCounts, values: Mapping[str, float]) -> float:
    return values["alpha"]


def _adaptive(counts: SignCounts, values: Mapping[str, float]) -> Tensor:
    return adaptive_alpha(counts, values["alpha_min"])


register_variant(
    Variant(
        name="hpo",
        title="HPO",
        formula="fixed α",
        alpha=_fixed,
        settings=(VariantSetting("alpha", 0.6, "α: weight of responses with negative advantage"),),
    )
)
register_variant(
    Variant(
        name="ahpo",
        title="A-HPO",
        formula="α = clip(p̂⁺ / p̂⁻, α_min, 1)",
        alpha=_adaptive,
        settings=(VariantSetting("alpha_min", 0.1, "α_min: lower limit of α"),),
    )
)
