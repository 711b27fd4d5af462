"""The folder for the recipe collection composes to what our own recipes compose to."""

import pytest

pytest.importorskip("verl")

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from typer.testing import CliRunner

from contrib.upstream import recipe
from contrib.upstream.__main__ import app
from contrib.upstream.tree import UnknownTreeError
from hpo_plugin.check.compose import compose as compose_by_name
from hpo_plugin.study.data import write_data
from hpo_plugin.study.spec import load_study

README = "| Recipe | file |\n|---|---|\n| gvpo | x |\n| retool | y |\n"


@pytest.fixture
def collection(tmp_path):
    (tmp_path / "README.md").write_text(README)
    done = CliRunner().invoke(app, ["--recipes", str(tmp_path)])
    assert done.exit_code == 0, done.output
    return tmp_path


def test_the_folder_has_what_every_recipe_has(collection):
    names = {path.name for path in (collection / "hpo").iterdir()}
    assert {"README.md", "REQUIRED_VERL.txt", "config", "run_hpo.sh", "requirements.txt"} == names
    lines = (collection / "hpo/REQUIRED_VERL.txt").read_text().splitlines()
    pins = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert pins["MODE"] == "pinned_tag"
    assert pins["PIP_INSTALL"] == "pip install verl==0.9.1"
    # The collection's install_verl.sh --method git needs one of the two; no tag is named without its commit.
    assert "COMMIT" in pins or pins["GIT_SETUP"].startswith("pip download verl==0.9.1 ")
    assert ("TAG" in pins) == ("COMMIT" in pins)
    assert "@" not in (collection / "hpo/README.md").read_text().replace("verl@git", "")


def test_the_collections_index_gets_one_row_in_its_place(collection):
    rows = (collection / "README.md").read_text().splitlines()
    assert rows[2:] == ["| gvpo | x |", recipe.ROW.strip(), "| retool | y |"]


def test_running_it_twice_changes_nothing(collection):
    assert recipe.changes(collection, None) == {}


def cells(readme, start):
    return [line.strip("| ").split(" | ") for line in readme.splitlines() if line.startswith(start)]


def test_clusters_are_listed_by_size(collection):
    readme = (collection / "hpo/README.md").read_text()
    assert cells(readme, "| `CLUSTER`") == [["`CLUSTER`", "`1x8`, `2x8`, `4x8`, `8x8`, `64x8`"]]


def test_without_a_study_the_results_are_the_papers_alone(collection):
    readme = (collection / "hpo/README.md").read_text()
    assert "None was run on GPUs" in readme
    assert {row[-1] for row in cells(readme, "| TeleLogs") + cells(readme, "| Countdown")} == {"–"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("config_name", ["hpo_recipe", "countdown_cpu"])
def test_scores_of_a_study_stand_beside_the_papers_where_it_is_one_of_this_recipe(tmp_path, made_up, config_name):
    study = {
        "name": "small",
        "title": "A small study",
        "config_name": config_name,
        "steps": 4,
        "test_every": 2,
        "settings": {"one": {"title": "One", "overrides": ["hpo/task=countdown4"]}},
        "arms": {
            "grpo": {"title": "GRPO", "overrides": ["algorithm.policy_loss=grpo"]},
            "adaptive": {"title": "A-HPO", "overrides": ["algorithm.policy_loss=ahpo"], "paper": "ahpo"},
        },
        "experiments": {
            "main": {
                "title": "Main",
                "setting": "one",
                "arms": ["grpo", "adaptive"],
                "seeds": [0],
                "paper": "countdown4-qwen2.5-7b",
            }
        },
    }
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(study))
    # Held-out success is 0.2 after two steps and 0.3 after four, for A-HPO 0.4 and 0.5.
    data = [made_up(cell, held_out=0.4 if cell.arm == "adaptive" else 0.2) for cell in load_study(file).cells()]
    write_data(tmp_path / "small.parquet", data)
    (tmp_path / "README.md").write_text(README)
    readme = recipe.changes(tmp_path, file)["hpo/README.md"]
    of_recipe = config_name == "hpo_recipe"
    assert [[*row[1:3], row[3][:5]] for row in cells(readme, "| Countdown with 4")] == [
        ["`ahpo`", "0.63", "0.500" if of_recipe else "–"],
        ["`grpo`", "0.58", "0.300" if of_recipe else "–"],
    ]
    assert {row[-1] for row in cells(readme, "| TeleLogs")} == {"–"}
    assert ("None was run on GPUs" in readme) != of_recipe
    assert ("run with the config `countdown_cpu`, not with this recipe's" in readme) != of_recipe
    assert ("on the machine that it names" in readme) == of_recipe


def test_another_recipe_of_that_name_is_not_replaced(tmp_path):
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "hpo").mkdir()
    (tmp_path / "hpo/README.md").write_text("another recipe\n")
    done = CliRunner().invoke(app, ["--recipes", str(tmp_path)])
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
        ["hpo/task=countdown4", "hpo/model=qwen2.5-7b", "hpo/engine=megatron", "hpo/cluster=2x8"],
        ["hpo/task=telelogs", "hpo/model=llama-3.2-3b", "hpo/engine=fsdp2", "algorithm.policy_loss=gspo"],
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
        assert f'hpo/{name.lower()}="${name}"' in script
