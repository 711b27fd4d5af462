"""The collected file: every step once, exact to single precision, the same bytes for the same cells."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from hpo_plugin.study.data import HELD_OUT, LONGEST, METRICS, REWARD, CellData, check_inputs, read_data, write_data
from hpo_plugin.study.spec import StudyError


@pytest.fixture
def cell(declared, load):
    return load(declared).cells()[0]


def test_what_is_written_is_read(tmp_path, data):
    path = tmp_path / "data.parquet"
    write_data(path, data.values())
    again = read_data(path)
    assert again.keys() == data.keys()
    for key, cell in data.items():
        assert again[key].same_as(cell)
        assert (again[key].setting, again[key].arm, again[key].seed) == (cell.setting, cell.arm, cell.seed)
        assert again[key].info == cell.info
    assert read_data(tmp_path / "none.parquet") == {}


def test_the_order_in_which_cells_come_does_not_matter(tmp_path, data):
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    write_data(one, data.values())
    write_data(two, reversed(data.values()))
    assert one.read_bytes() == two.read_bytes()


def test_sixty_cells_of_sixty_steps_stay_below_a_megabyte(tmp_path, data):
    rng = np.random.default_rng(0)
    (template, *_) = data.values()
    cells = [
        CellData(str(n), "s", "a", n, template.info, {m: rng.random(61, np.float32) for m in METRICS})
        for n in range(60)
    ]
    write_data(tmp_path / "data.parquet", cells)
    assert (tmp_path / "data.parquet").stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("steps", "said"), [([0, 1, 3, 4], "step 2 is not logged"), ([0, 1, 2, 3, 4, 5], "step 5 is logged, but")]
)
def test_a_cell_with_a_step_too_few_or_too_many_is_refused(cell, steps, said):
    with pytest.raises(StudyError, match=said):
        CellData.of(cell, {step: {} for step in steps}, {})


def test_what_verl_did_not_log_is_unknown(cell):
    found = CellData.of(cell, {step: {REWARD: 0.5} for step in range(5)}, {})
    assert np.isnan(found.values[HELD_OUT]).all()
    assert found.values[REWARD].tolist() == [0.5] * 5


def test_time_adds_up_over_the_steps(data):
    (cell, *_) = data.values()
    assert cell.seconds.tolist() == [0, 2, 4, 6, 8]


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(StudyError, match=r"text\.parquet does not hold collected data"):
        read_data(tmp_path / "text.parquet")


def test_a_metric_that_an_earlier_version_did_not_collect_is_unknown(tmp_path, data):
    path = tmp_path / "data.parquet"
    write_data(path, data.values())
    pq.write_table(pq.read_table(path).drop_columns([LONGEST]), path)
    for key, cell in read_data(path).items():
        assert np.isnan(cell.values[LONGEST]).all()
        assert np.array_equal(cell.values[REWARD], data[key].values[REWARD], equal_nan=True)


def test_a_file_that_lost_a_row_or_holds_a_cell_twice_is_refused(tmp_path, data):
    path = tmp_path / "data.parquet"
    write_data(path, data.values())
    table = pq.read_table(path)
    pq.write_table(table.take([0, 1, 3, 4]), path)
    with pytest.raises(StudyError, match="rows 0 to 4 are not the consecutive steps of one cell"):
        read_data(path)
    pq.write_table(table.take([*range(5), *range(5)]), path)
    with pytest.raises(StudyError, match="appears twice"):
        read_data(path)


def test_cells_of_a_setting_that_began_from_other_inputs_are_not_compared(data):
    one, two, *_ = data.values()
    check_inputs([one, two], {})
    other = CellData(two.key, two.setting, two.arm, two.seed, {**two.info, "inputs": "other"}, two.values)
    with pytest.raises(StudyError, match=r"easy/ahpo/seed0 and easy/grpo/seed0 started from different inputs"):
        check_inputs([one, other], {})
    check_inputs([one, CellData(two.key, two.setting, two.arm, two.seed + 1, other.info, two.values)], {})


def test_cells_of_settings_that_are_compared_start_from_the_same_inputs(data):
    one, *_ = data.values()
    simulated = CellData("other", "simulated", one.arm, one.seed, {**one.info, "inputs": "other"}, one.values)
    check_inputs([one, simulated], {})
    with pytest.raises(StudyError, match=rf"simulated/{one.arm}/seed0 and easy/{one.arm}/seed0 started from different"):
        check_inputs([one, simulated], {"simulated": "easy"})
