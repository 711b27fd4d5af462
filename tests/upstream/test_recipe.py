"""The folder for the recipe collection composes to what our own recipes compose to."""

import pytest

pytest.importorskip("verl")

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from typer.testing import CliRunner

from hpo_plugin.cli._checks import compose as compose_by_name
from hpo_plugin.cli.app import app
from hpo_plugin.upstream import recipe
from hpo_plugin.upstream.contribution import UnknownTreeError

README = "| Recipe | file |\n|---|---|\n| gvpo | x |\n| retool | y |\n"


@pytest.fixture
def collection(tmp_path):
    (tmp_path / "README.md").write_text(README)
    done = CliRunner().invoke(app, ["upstream", "--recipes", str(tmp_path)])
    assert done.exit_code == 0, done.output
    return tmp_path


def test_the_folder_has_what_every_recipe_has(collection):
    names = {path.name for path in (collection / "hpo").iterdir()}
    assert {"README.md", "REQUIRED_VERL.txt", "config", "run_hpo.sh", "requirements.txt"} == names
    pins = dict(line.split("=", 1) for line in (collection / "hpo/REQUIRED_VERL.txt").read_text().splitlines())
    assert pins["MODE"] == "pinned_tag"
    assert pins["PIP_INSTALL"] == "pip install verl==0.9.1"
    assert "@" not in (collection / "hpo/README.md").read_text().replace("verl@git", "")


def test_the_collections_index_gets_one_row_in_its_place(collection):
    rows = (collection / "README.md").read_text().splitlines()
    assert rows[2:] == ["| gvpo | x |", recipe.ROW.strip(), "| retool | y |"]


def test_running_it_twice_changes_nothing(collection):
    assert recipe.changes(collection, None) == {}


def test_another_recipe_of_that_name_is_not_replaced(tmp_path):
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "hpo").mkdir()
    (tmp_path / "hpo/README.md").write_text("another recipe\n")
    done = CliRunner().invoke(app, ["upstream", "--recipes", str(tmp_path)])
    assert done.exit_code == 1
    assert "hpo/README.md exists with another content" in done.output
    assert (tmp_path / "hpo/README.md").read_text() == "another recipe\n"
    assert [path.name for path in (tmp_path / "hpo").iterdir()] == ["README.md"]


def test_another_repository_is_refused(tmp_path):
    with pytest.raises(UnknownTreeError, match="not a checkout of verl's recipe collection"):
        recipe.changes(tmp_path, None)


@pytest.mark.parametrize(
    "choices",
    [
        ["recipe/task=countdown4", "recipe/model=qwen2.5-7b", "recipe/engine=megatron", "recipe/cluster=2x8"],
        ["recipe/task=telelogs", "recipe/model=llama-3.2-3b", "recipe/engine=fsdp2", "algorithm.policy_loss=gspo"],
    ],
)
def test_the_folders_config_is_ours(collection, choices):
    with initialize_config_dir(str(collection / "hpo/config"), version_base=None):
        theirs = compose("hpo_recipe", overrides=["hydra.searchpath=[pkg://verl.trainer.config]", *choices])
    ours, finding = compose_by_name("hpo_recipe", choices)
    assert ours is not None, finding
    assert OmegaConf.to_container(theirs) == OmegaConf.to_container(ours)


def test_the_script_sets_the_groups_of_the_config(collection):
    script = (collection / "hpo/run_hpo.sh").read_text()
    for name in ("TASK", "MODEL", "ENGINE", "CLUSTER"):
        assert f'recipe/{name.lower()}="${name}"' in script
