"""Large inputs, with smaller numbers than in the full run; and that the limits find what they are for."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from hpo_plugin.console import LISTED, listed
from hpo_plugin.study.cells import Workspace
from hpo_plugin.study.collect import collect
from hpo_plugin.study.data import read_data, write_data
from hpo_plugin.study.run import SEED_COLUMNS, look, show_failures, state_table
from hpo_plugin.study.spec import load_study
from torture import scale
from torture.probe import Result


def test_memory_is_the_peak_of_a_call_and_not_what_stays():
    def temporary():
        return int(np.ones(64 * scale.MIB, dtype=np.uint8).sum())

    peak, _ = scale.peak_bytes(temporary)
    assert 60 * scale.MIB < peak < 100 * scale.MIB
    peak, _ = scale.peak_bytes(lambda: 1)
    assert peak < 8 * scale.MIB


def test_the_estimator_has_the_values_of_the_reference_in_little_memory(tmp_path):
    pytest.importorskip("verl")
    # Timings of a busy machine are not judged. The batch is so large that its memory is not that of earlier tests.
    found = scale.estimate(2048, 8192, tmp_path, seconds=0.0, timed=False)
    assert found.failures == []
    assert found.worst["`grpo` (MiB)"] > 1.5 * found.worst["peak beyond the batch, `ahpo` (MiB)"]


def test_a_wrong_value_is_found(tmp_path, monkeypatch):
    pytest.importorskip("verl")
    monkeypatch.setattr(scale, "expected_weighted", lambda scores: np.ones(len(scores)))
    (failure,) = scale.estimate(32, 64, tmp_path, seconds=0.0, timed=False).failures
    assert failure == "32 x 64, row 0: not the weighted advantage"


# --- nodes ---------------------------------------------------------------------------------------------------------


def test_nodes_with_the_same_finding_have_one_line(tmp_path):
    pytest.importorskip("ray")
    assert scale.check_cluster(512, tmp_path).failures == []


def test_each_version_and_each_message_has_a_line_of_its_own_and_a_single_node_is_named():
    pytest.importorskip("ray")
    config = OmegaConf.create({"trainer": {"nnodes": 2, "n_gpus_per_node": 8}})
    nodes = scale.Nodes(6, {"other version": 1, "other code": 1, "lost": 2})
    report, text = scale.cluster_report(nodes, config)
    names = [finding.name for finding in report.findings]
    assert names == ["node 10.0.0.2", "node 10.0.0.3", "2 nodes", "2 nodes", "accelerators"]
    assert "gpu-1: verl is 0.9.0, but 0.9.1 locally" in text
    assert "gpu-3, gpu-4: System error: the worker" in text
    assert "gpu-5, gpu-6: registered, same versions" in text
    assert "the nodes of the cluster have 6 x 8" in text


def test_a_launch_on_many_nodes_loses_nodes_and_resumes(tmp_path):
    pytest.importorskip("verl")
    assert scale.launch_cluster(512, tmp_path).failures == []


def test_a_long_output_is_found():
    result = Result()
    scale.check_text(result, "\n".join(["node"] * 512))
    scale.check_text(result, ", ".join(["gpu-000"] * 512))
    assert len(result.failures) == 2


# --- studies -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A study of 120 finished cells: 5 arms, 24 seeds."""
    folder = tmp_path_factory.mktemp("study")
    path = scale.write_study(folder, 120, 8)
    return folder, load_study(path)


def test_all_cells_are_found_without_a_search_for_each(written, monkeypatch):
    folder, study = written
    workspace, listings = Workspace(study, folder / "runs"), []
    iterdir = type(folder).iterdir
    monkeypatch.setattr(type(folder), "iterdir", lambda path: listings.append(path) or iterdir(path))
    entries = look(workspace, study.cells(), {})
    assert [entry.state.value for entry in entries] == ["finished"] * 120
    assert listings.count(workspace.directory / "cells") == 1


def test_a_text_of_a_cell_is_stored_once_and_read_once(written, tmp_path):
    folder, study = written
    done = collect(Workspace(study, folder / "runs"), tmp_path / "study.parquet", prune=False)
    assert len(done.added) == 120
    cells = read_data(tmp_path / "study.parquet")
    log = folder / "runs" / "large" / "cells"
    (key, data) = next(iter(cells.items()))
    (directory,) = log.glob(f"*-{key}")
    rows = [json.loads(line) for line in (directory / "attempt-1" / "metrics.jsonl").read_text().splitlines()]
    logged = [row["data"]["critic/rewards/mean"] for row in rows[1:]]
    assert data.values["critic/rewards/mean"][1:].tolist() == np.array(logged, np.float32).tolist()
    # 2 MB of text, more than a dictionary of parquet has by default; in all rows it would be 18 MB.
    large = [
        type(data)(
            data.key, data.setting, data.arm, data.seed, {**data.info, "note": f"{number:06d}" * 3000}, data.values
        )
        for number, data in enumerate(cells.values())
    ]
    write_data(tmp_path / "large.parquet", large)
    columns = pq.read_metadata(tmp_path / "large.parquet").row_group(0)
    (info,) = [
        columns.column(number)
        for number in range(columns.num_columns)
        if columns.column(number).path_in_schema == "info"
    ]
    assert 2e6 < info.total_uncompressed_size < 4e6
    again = read_data(tmp_path / "large.parquet")
    assert {key: data.info for key, data in again.items()} == {data.key: data.info for data in large}
    # Other readers see plain texts.
    assert str(pq.read_table(tmp_path / "large.parquet").schema.field("info").type) == "string"


def test_a_study_with_many_seeds_has_a_table_of_counts_and_failures_with_one_cause_are_shown_once(tmp_path):
    study = load_study(scale.write_study(tmp_path, 120, 2))
    scale.fail_cells(tmp_path, 40)
    entries = look(Workspace(study, tmp_path / "runs"), study.cells(), {})
    with (tmp_path / "shown").open("w") as file:
        console = Console(file=file, width=200)
        console.print(state_table(study, entries))
        show_failures([entry for entry in entries if entry.state.value == "failed"], console)
    shown = (tmp_path / "shown").read_text()
    assert len({entry.cell.seed for entry in entries}) > SEED_COLUMNS
    counted = [sum(map(int, line.split()[2:])) for line in shown.splitlines() if line.startswith("setting-0 ")]
    assert counted == [24] * 5
    assert shown.count("no space left") == 1
    assert f"39 other cells failed with the same cause: {study.cells()[0].setting}" in shown
    assert f"and {39 - LISTED} more" in shown


def test_the_commands_count_every_cell(tmp_path):
    assert scale.study(30, 4, tmp_path, failed=10).failures == []


def test_names_are_listed_up_to_a_limit():
    assert listed([]) == ""
    assert listed(map(str, range(LISTED))).endswith(str(LISTED - 1))
    assert listed(map(str, range(LISTED + 3))).endswith(f"{LISTED - 1} and 3 more")
