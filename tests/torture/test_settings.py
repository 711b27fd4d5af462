"""Each wrong setting stops before Ray starts, with an error that names key, value and remedy; the remedy works."""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import re
import shlex
import sys

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from typer.testing import CliRunner

from torture import settings
from torture.settings import CHECK, CONFIGS, ROWS, Wrong

pytest.importorskip("verl")

from verl.trainer import main_ppo

from hpo_plugin.check import checks
from hpo_plugin.check.compose import compose

#: The rows that need no process of their own.
IN_PROCESS = [row for row in ROWS if not set(row.environment) - {"VERL_PLATFORM"}]


class RayStarts(BaseException):
    """The run got past everything that is checked before Ray starts."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    settings.make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def composed(work):
    """Compose a config as its command does: once, and with Hydra's own function for the words of each row."""

    @functools.cache
    def base(config_name: str, groups: tuple[str, ...]) -> bytes:
        overrides = [*CONFIGS[config_name].replace("{work}", str(work)).split(), *groups]
        config, finding = compose(config_name, overrides)
        if config is None:
            raise HydraException(finding.found)
        return pickle.dumps(config)

    def with_words(config_name: str, words: list[str]):
        groups = tuple(word for word in words if word.startswith("hpo/"))
        config = pickle.loads(base(config_name, groups))
        overrides = OverridesParser.create().parse_overrides([word for word in words if word not in groups])
        ConfigLoaderImpl._apply_overrides_to_config(overrides, config)
        return config

    return with_words


@pytest.fixture(scope="module")
def start(composed, work):
    """Run ``main_ppo`` up to ``ray.init``, and return what it raises."""

    @functools.cache
    def run(config_name: str, words: str) -> BaseException:
        def ray_starts(**_):
            raise RayStarts

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setattr(main_ppo.ray, "init", ray_starts)
            patch.setattr(main_ppo.ray, "is_initialized", lambda: False)
            try:
                main_ppo.main.__wrapped__(composed(config_name, shlex.split(words.replace("{work}", str(work)))))
            except (Exception, RayStarts) as error:
                return error
        raise AssertionError("main_ppo returned")

    return run


@pytest.fixture
def check(composed, work):
    """The failed findings of ``hpo-plugin check``, without those of the installation."""

    def run(words: str) -> str:
        config_name = next(iter(CHECK_OPTIONS.findall(words)), "hpo_trainer")
        given = shlex.split(CHECK_OPTIONS.sub("", words).replace("{work}", str(work)))
        if config_name != "hpo_trainer" or any("/" in word.partition("=")[0] for word in given):
            findings = [compose(config_name, given)[1]]
        else:
            reward = f"reward.custom_reward_function.path={work}/reward.py"
            try:
                findings = checks.check_config(composed("hpo_trainer", [reward, *given]))
            except HydraException:
                findings = [compose("hpo_trainer", given)[1]]
        return "\n".join(f"{finding.found}\n{finding.remedy}" for finding in findings if not finding.ok)

    return run


CHECK_OPTIONS = re.compile(r"--config-name=(\S+)")


def rows(*commands):
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=row.name) for row in IN_PROCESS if row.command in commands]
    )


@rows(*CONFIGS)
def test_a_run_stops_before_ray_starts_and_the_remedy_works(row: Wrong, start, monkeypatch):
    for name, value in row.environment.items():
        monkeypatch.setenv(name, value)
    error = start(row.command, row.words)
    assert not isinstance(error, RayStarts)
    assert settings.complaints(row, str(error)) == []
    if row.right is not None:
        corrected = start(row.command, row.right)
        assert isinstance(corrected, RayStarts), corrected


@rows(CHECK)
def test_the_check_fails_and_the_remedy_works(row: Wrong, check):
    if "--config-dir" in row.words:
        pytest.skip("an option of the command")
    assert settings.complaints(row, check(row.words)) == []
    if row.right is not None:
        assert check(row.right) == ""


@rows(*{row.command for row in ROWS if row.command.startswith("hpo-plugin")} - {CHECK})
def test_a_command_stops(row: Wrong, work, monkeypatch):
    from hpo_plugin.cli.app import app

    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("TERMINAL_WIDTH", "1000")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = CliRunner().invoke(app, settings.argv(row, work)[3:])
    assert done.exit_code != 0
    assert settings.complaints(row, done.output + str(done.exception)) == []


@rows("hpo_plugin.openrlhf")
def test_openrlhfs_command_stops(row: Wrong, monkeypatch):
    from hpo_plugin.errors import ConfigError
    from hpo_plugin.openrlhf import command

    monkeypatch.setattr(sys, "argv", ["hpo_plugin.openrlhf", *shlex.split(row.words)])
    with pytest.raises(ConfigError) as raised:
        command.main()
    assert settings.complaints(row, str(raised.value)) == []


def test_an_error_without_key_value_or_remedy_is_seen():
    row = Wrong("hpo_trainer", "+algorithm.hpo.alpha=2", "Set a number")
    assert settings.complaints(row, "algorithm.hpo.alpha=2 is wrong. Set a\n│ number.") == []
    assert len(settings.complaints(row, "alpha is wrong. Set a number.")) == 1
    assert len(settings.complaints(row, "algorithm.hpo.alpha=2 is wrong.")) == 1


def test_rows_are_distinct_and_cover_every_command():
    names = [(row.name, tuple(row.environment.items())) for row in ROWS]
    assert len(names) == len(set(names)) >= 60
    assert {"ppo_trainer", "hpo_trainer", "hpo_recipe", "HPOConfig", "hpo_plugin.openrlhf"} <= {r.command for r in ROWS}


def test_the_page_has_the_rows():
    text = settings.PAGE.read_text()
    assert settings.page(text) == text
    assert settings.table() in text
