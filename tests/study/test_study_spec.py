"""A study says what is wrong with it before anything runs; its cells are the matrix, each once."""

from pathlib import Path

import pytest

from hpo_plugin.study.spec import StudyError, load_study, select

ROOT = Path(__file__).parents[2]


def names(study):
    return [cell.name for cell in study.cells()]


def test_the_cells_are_arms_times_seeds_with_seeds_outermost(declared, load):
    assert names(load(declared)) == [
        *("easy/grpo/seed0", "easy/ahpo/seed0", "hard/grpo/seed0", "hard/ahpo/seed0"),
        *("easy/grpo/seed1", "easy/ahpo/seed1", "hard/grpo/seed1", "hard/ahpo/seed1"),
        *("easy/grpo/seed2", "easy/ahpo/seed2"),
    ]


def test_a_cell_is_told_everything_that_decides_it(declared, load):
    cell = load(declared).cells()[3]
    assert list(cell.overrides) == [
        *("data.train_batch_size=8", "data.hard=1", "algorithm.policy_loss=ahpo"),
        *("data.seed=0", "trainer.total_training_steps=4", "trainer.test_freq=2"),
    ]


def test_cells_that_two_experiments_name_are_run_once(declared, load):
    declared["experiments"]["three"] = {"title": "3", "setting": "easy", "arms": ["ahpo"], "seeds": [2, 5]}
    found = names(load(declared))
    assert len(found) == len(set(found)) == 11
    assert found[-1] == "easy/ahpo/seed5"


def test_one_training_under_two_names_is_refused(declared, load):
    declared["arms"]["again"] = declared["arms"]["grpo"]
    declared["experiments"]["one"]["arms"].append("again")
    with pytest.raises(StudyError, match="easy/again/seed0 and easy/grpo/seed0 are the same training"):
        load(declared)


@pytest.mark.parametrize(
    "change",
    [
        lambda study: study.update(steps=5),
        lambda study: study.update(test_every=1),
        lambda study: study.update(config_name="telelogs_cpu"),
        lambda study: study.update(environment={"VERL_PLATFORM": "cpu"}),
        lambda study: study["overrides"].append("a=1"),
        lambda study: study["settings"]["easy"].update(overrides=["b=1"]),
        lambda study: study["settings"]["easy"].update(steps=8),
        lambda study: study["settings"]["easy"].update(
            prepare={"task": "countdown", "problems": {"counts": [3]}, "train_size": 8, "test_size": 8}
        ),
        lambda study: study["arms"]["grpo"].update(overrides=["c=1"]),
    ],
)
def test_what_changes_the_training_makes_another_cell(declared, load, change):
    before = load(declared).cells()[0].key
    change(declared)
    assert load(declared).cells()[0].key != before


@pytest.mark.parametrize("key", ["title", "text", "save_every", "submit", "scores"])
def test_what_does_not_change_the_training_leaves_the_cell(declared, load, key):
    before = load(declared).cells()[0].key
    declared[key] = {"title": "T", "text": "t", "save_every": 3, "submit": "x {arguments}", "scores": {}}[key]
    assert load(declared).cells()[0].key == before


def test_a_renamed_arm_or_setting_is_the_same_cell(declared, load):
    before = [cell.key for cell in load(declared).cells()]
    for kind, old, new in (("arms", "ahpo", "adaptive"), ("settings", "easy", "simple")):
        declared[kind][new] = declared[kind].pop(old)
    for experiment in declared["experiments"].values():
        experiment["arms"] = ["grpo", "adaptive"]
        experiment["compare"] = "adaptive"
    declared["experiments"]["one"]["setting"] = "simple"
    assert [cell.key for cell in load(declared).cells()] == before


TELELOGS = {"task": "telelogs", "train_size": 8, "test_size": 8}
SWEEP = {"title": "S", "quantity": "learning rate", "experiments": {"one": 1e-4, "two": 3e-4}}
PREPARE = {"task": "countdown", "problems": {"counts": [3]}, "train_size": 8, "test_size": 8}


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("stepz", 3, "stepz"),
        ("settings.easy.colour", 3, "settings.easy.colour"),
        ("steps", "many", "many"),
        ("steps", 0, "steps=0 must be at least 1"),
        ("name", "A study", "'A study' must consist of lowercase"),
        ("arms", {}, "arms is empty"),
        ("experiments.one.arms", [], "experiments.one.arms is empty"),
        ("experiments.one.seeds", [], "experiments.one.seeds is empty"),
        ("experiments.one.seeds", [1, 2, 1], "lists 1 twice"),
        ("experiments.one.seeds", [-1], "-1 must not be negative"),
        ("experiments.one.arms", ["grpo", "ppo"], "'ppo' is not one of the arms: grpo, ahpo"),
        ("experiments.one.setting", "odd", "'odd' is not one of the settings: easy, hard"),
        ("experiments.one.compare", "gspo", "compare='gspo' is not one of its arms: grpo, ahpo"),
        ("experiments.one.paper", "mine", "paper='mine' is not one of telelogs"),
        ("arms.spare", {"title": "Spare"}, "arms.spare is in no experiment"),
        ("settings.spare", {"title": "Spare"}, "settings.spare is in no experiment"),
        ("arms.grpo.overrides", ["data.seed=3"], "use experiments.<name>.seeds"),
        ("arms.grpo.overrides", ["++trainer.test_freq=3"], "use test_every"),
        ("arms.grpo.overrides", ["trainer.resume_mode=auto"], "the run sets it"),
        ("arms.grpo.overrides", ["data.train_batch_size=9"], "conflicts with 'data.train_batch_size=8' in overrides"),
        ("settings.easy", {"title": "E", "prepare": PREPARE, "overrides": ["data.val_files=x"]}, "contradicts"),
        (
            "settings.easy.prepare",
            TELELOGS | {"problems": {"reduction": "full"}},
            "laptop form of telelogs, which sets reduction",
        ),
        ("settings.easy.prepare", TELELOGS | {"problems": {"balance": "odd"}}, "balance='odd' is not one of"),
        (
            "settings.easy.prepare",
            PREPARE | {"problems": {"train_size": 9}},
            "train_size is a key of prepare, not of problems",
        ),
        ("settings.easy.prepare", PREPARE | {"task": "chess"}, "prepare.task: 'chess' is neither a built-in task"),
        ("settings.easy.prepare", PREPARE | {"train_size": 0}, "prepare.train_size=0 must be at least 1"),
        ("settings.easy.prepare", PREPARE | {"problems": {"counts": [1]}}, "prepare.problems: .*at least 2 numbers"),
        (
            "settings.easy.prepare",
            PREPARE | {"problems": {"size": 1}},
            "problems: size is not an option of the countdown data; the options are ",
        ),
        ("scores.final_evaluations", 3, "exceeds the 2 evaluations of settings.easy"),
        ("scores.early_fraction", 0, "scores.early_fraction=0.0 must be in"),
        ("submit", "sbatch job.sh", "must contain {arguments}"),
        ("trainer", "ray", "trainer='ray' is not one of verl, simulator"),
        ("settings.easy.trainer", "ray", "settings.easy.trainer='ray' is not one of"),
        ("settings.easy.trainer", "simulator", "settings.easy.prepare is missing"),
        ("experiments.one.against", "odd", "experiments.one.against='odd': no other experiment"),
        ("sweeps", {"s": SWEEP | {"experiments": {"one": 1}}}, "sweeps.s.experiments lists 1 experiments"),
        ("sweeps", {"s": SWEEP | {"experiments": {"one": 1, "three": 2}}}, "'three' is not one of the experiments"),
        ("sweeps", {"s": SWEEP}, r"the experiments must have the same seeds, but one has \[0, 1\]"),
    ],
)
def test_a_study_that_contradicts_itself_names_key_and_value(declared, load, where, value, said):
    *path, last = where.split(".")
    node = declared
    for key in path:
        node = node[key]
    node[last] = value
    with pytest.raises(StudyError, match=said):
        load(declared)


@pytest.mark.parametrize("values", [(1.0, -1.0), (2.0, 2.0)])
def test_values_of_a_sweep_are_positive_and_differ(declared, load, values):
    declared["experiments"]["two"]["seeds"] = [0, 1, 2]
    declared["sweeps"] = {"s": SWEEP | {"experiments": dict(zip(("one", "two"), values, strict=True))}}
    with pytest.raises(StudyError, match=r"must be distinct positive numbers"):
        load(declared)


def test_the_trainer_is_part_of_a_cell_unless_it_is_verls(declared, load):
    for setting in declared["settings"].values():
        setting["prepare"] = PREPARE
    before = [cell.key for cell in load(declared).cells()]
    assert [cell.key for cell in load({**declared, "trainer": "verl"}).cells()] == before
    declared["settings"]["easy"]["trainer"] = "simulator"
    cells = load(declared).cells()
    assert [cell.trainer for cell in cells[:4]] == ["simulator", "simulator", "verl", "verl"]
    assert [cell.key for cell in cells] != before
    assert cells[2].key == before[2]


def test_a_missing_field_is_named(declared, load):
    del declared["settings"]["easy"]["title"]
    with pytest.raises(StudyError, match="title"):
        load(declared)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"nowhere\.yaml"):
        load_study(tmp_path / "nowhere.yaml")


def test_filters_join_words_and_add_up(declared, load):
    cells = load(declared).cells()
    assert [cell.name for cell in select(cells, ["easy/seed0", "hard/ahpo"])] == [
        *("easy/grpo/seed0", "easy/ahpo/seed0", "hard/ahpo/seed0", "hard/ahpo/seed1"),
    ]
    assert select(cells, []) == cells
    with pytest.raises(StudyError, match="matches no cell"):
        select(cells, ["easy/seed7"])


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_this_repository_are_valid(path):
    assert load_study(path).cells()
