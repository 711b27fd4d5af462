"""TRL's ``GRPOConfig`` and the settings of HPO, checked when the config is built."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from hpo_plugin.errors import ConfigError
from hpo_plugin.variants import resolve

__all__ = ["HPOConfig"]


_TRL_FIELDS = {trl_field.name for trl_field in fields(GRPOConfig)}


@dataclass
class HPOConfig(GRPOConfig):
    """`trl.GRPOConfig` with the settings of HPO.

    All other fields mean what they mean for GRPO. ``loss_type`` stays TRL's default ``"dapo"``: a token's loss is
    divided by the tokens of the generation batch, which is HPO's mean length.

    Args:
        policy: The variant: ``"ahpo"`` (α from the batch's counts of positive and negative advantages), ``"hpo"``
            (fixed α), or one that was registered with :func:`hpo_plugin.variants.register_variant`. A subclass of this
            dataclass adds fields for the settings of such a variant.
        alpha: α of ``policy="hpo"``, in [0, 1]; 0.6 if None.
        alpha_min: Lower limit of α of ``policy="ahpo"``, in [0, 1]; 0.1 if None.
        observe: Apply no α: the run is TRL's GRPO, with any loss, and logs what A-HPO would use as ``hpo/observe/…``.

    Raises:
        ConfigError: An unknown policy, a setting out of range or of another policy, or a loss that is not HPO's. The
            message names the field, its value, and what to do.
    """

    policy: str = field(
        default="ahpo",
        metadata={"help": "Variant of HPO: 'ahpo' (alpha from the batch's counts) or 'hpo' (fixed alpha)."},
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Weight of negative advantages for policy='hpo', in [0, 1]. Default: 0.6."}
    )
    alpha_min: float | None = field(
        default=None, metadata={"help": "Lower limit of alpha for policy='ahpo', in [0, 1]. Default: 0.1."}
    )
    observe: bool = field(
        default=False, metadata={"help": "Train with TRL's GRPO, and log the statistics of A-HPO as hpo/observe/..."}
    )

    def __post_init__(self) -> None:
        """Check the settings of HPO, and those of TRL."""
        if self.num_generations == 1:
            raise ConfigError(
                "num_generations=1 trains nothing: in a group of one completion the advantage is 0. Set "
                "num_generations to 2 or more."
            )
        super().__post_init__()
        variant, _ = resolve(self.policy, self._given())
        for name in {setting.name for setting in variant.settings} & _TRL_FIELDS:
            raise ConfigError(
                f"policy={self.policy!r} has a setting {name!r}, which is also a field of GRPOConfig. Rename the "
                "setting."
            )
        if not isinstance(self.observe, bool):
            raise ConfigError(f"observe={self.observe!r} must be True or False. Set observe=True, or remove it.")
        if self.observe:
            if self.policy != "ahpo":
                raise ConfigError(
                    f"policy={self.policy!r} has no effect with observe=True, which applies no α and logs the α of "
                    "A-HPO. Remove one of the two."
                )
            return
        if self.loss_type != "dapo":
            raise ConfigError(
                f"loss_type={self.loss_type!r} is not HPO's objective. HPO clips ratios as GRPO does and divides by "
                "the batch's mean length. Set loss_type='dapo' (TRL's default), or use GRPOTrainer."
            )
        if self.importance_sampling_level != "token":
            raise ConfigError(
                f"importance_sampling_level={self.importance_sampling_level!r} is not HPO's objective. HPO uses "
                "token-level ratios. Set importance_sampling_level='token' (TRL's default), or use GRPOTrainer."
            )

    def _given(self) -> dict[str, Any]:
        """Return the settings of variants: the fields that GRPOConfig does not have."""
        return {added.name: getattr(self, added.name) for added in fields(self) if added.name not in _TRL_FIELDS}

    def settings_of_policy(self) -> dict[str, float]:
        """Return the value of each setting of all variants, defaults filled in.

        Raises:
            ConfigError: A setting was changed to a value out of range after the config was built.
        """
        return resolve(self.policy, self._given())[1]
