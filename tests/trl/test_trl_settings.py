"""The wrong settings of TRL's config stop when the config is built, with an error that names key, value and remedy."""

import shlex

import pytest

pytest.importorskip("trl", minversion="1.10", exc_type=ImportError, reason="TRL is not installed (make test-trl)")

from trl import TrlParser

from hpo_plugin.errors import ConfigError
from hpo_plugin.trl import HPOConfig
from torture import settings


def parsed(words, folder):
    base = ["--output_dir", str(folder), "--use_cpu", "--bf16", "no", "--report_to", "none"]
    return TrlParser(HPOConfig).parse_args_and_config([*base, *shlex.split(words)])


@pytest.mark.parametrize("row", [pytest.param(r, id=r.words) for r in settings.ROWS if r.command == "HPOConfig"])
def test_the_config_is_rejected_and_the_remedy_works(row, tmp_path):
    with pytest.raises(ConfigError) as raised:
        parsed(row.words, tmp_path)
    assert settings.complaints(row, str(raised.value)) == []
    parsed(row.right, tmp_path)
