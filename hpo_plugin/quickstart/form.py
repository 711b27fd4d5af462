"""The laptop form of a task: options of its data, config of its start model, and the inputs of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo_plugin.tasks.task import DataOptions, Task, laptop_form

if TYPE_CHECKING:
    from hpo_plugin.quickstart.start_model import StartModelConfig

#: Environment of a trainer on CPU cores. verl reads it in every process; Ray passes it on.
ENVIRONMENT = {"VERL_PLATFORM": "cpu"}


@dataclass(frozen=True)
class Inputs:
    """Inputs of a training run.

    Attributes:
        train_file: ``data.train_files``.
        test_file: ``data.val_files``.
        model: ``actor_rollout_ref.model.path``.
        start: What is known of the start model: its number of parameters, its success or loss.
    """

    train_file: Path
    test_file: Path
    model: Path
    start: Mapping[str, Any]

    def overrides(self) -> list[str]:
        """Return the Hydra overrides that name the inputs."""
        return [
            f"data.train_files={self.train_file.resolve()}",
            f"data.val_files={self.test_file.resolve()}",
            f"actor_rollout_ref.model.path={self.model.resolve()}",
        ]


def data_options(task: Task, given: Mapping[str, Any]) -> DataOptions:
    """Return the options of a task's data in its laptop form.

    Args:
        task: The task.
        given: Fields of ``task.Options``, beside those that the form sets.

    Raises:
        ValueError: A field that the options do not have, that the form sets to another value, or that is invalid.
    """
    fixed = laptop_form(task).data
    known = [field.name for field in fields(task.Options)]
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{name} is not an option of the {task.name} data; the options are {', '.join(known)}")
        if name in fixed and value != fixed[name]:
            raise ValueError(
                f"{name}={value!r} conflicts with the laptop form of {task.name}, which sets {name}={fixed[name]!r}; "
                "remove it"
            )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    options = task.Options(**{**fixed, **values})
    for field in fields(options):
        value, minimum = getattr(options, field.name), field.metadata.get("minimum")
        if minimum is not None and value is not None and not (isinstance(value, int) and value >= minimum):
            raise ValueError(f"{field.name}={value!r} must be an integer of at least {minimum}")
    task.validate(options)
    return options


def start_model_config(task: Task, given: Mapping[str, Any]) -> StartModelConfig:
    """Return the config of a task's start model.

    Args:
        task: The task.
        given: Fields of :class:`StartModelConfig`; the others keep the form's value, or their default.

    Raises:
        ValueError: A field that the class does not have, or that has no effect because verl's SFT trainer trains the
            model; or a value out of range.
    """
    from hpo_plugin.quickstart.start_model import SIZES, StartModelConfig

    form = laptop_form(task)
    known = SIZES if form.sft_config_name else tuple(asdict(StartModelConfig()))
    for name in given:
        if name not in known:
            if name in asdict(StartModelConfig()):
                sizes = ", ".join(known)
                raise ValueError(
                    f"{name} has no effect, because verl's SFT trainer trains this start model; the settings are "
                    f"{sizes}"
                )
            raise ValueError(
                f"{name} is not a setting of the start model of {task.name}; the settings are {', '.join(known)}"
            )
    config = StartModelConfig(**{**form.start_model, **given})
    config.validate()
    return config
