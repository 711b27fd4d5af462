"""What the nodes of a cluster are asked for: what lies where, what a run needs, and which of them died."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hpo_plugin.check.checks import local_files
from hpo_plugin.check.cluster import QUEUE_ACTOR, Cluster
from hpo_plugin.check.probe import _file_problems


def config(nodes, per_node):
    return OmegaConf.create({"trainer": {"nnodes": nodes, "n_gpus_per_node": per_node}})


def node(name, gpus, cpus=64, alive=True, key="GPU"):
    resources = {key: float(gpus), "CPU": float(cpus)} if alive else {}
    return {"NodeID": name, "NodeManagerAddress": f"10.0.0.{name}", "Alive": alive, "Resources": resources}


@pytest.fixture
def ray_of(monkeypatch):
    """Make Ray say that it has these nodes, so many free accelerators, and these named actors."""
    ray = pytest.importorskip("ray")

    def install(nodes, free=None, actors=()):
        total = sum(node["Resources"].get("GPU", 0) for node in nodes)
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray, "available_resources", lambda: {"GPU": total if free is None else free})
        monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: list(actors))
        return Cluster()

    return install


def test_a_run_can_start_when_its_nodes_are_there_and_free(ray_of):
    assert ray_of([node("1", 8), node("2", 8)]).lacks(config(2, 8)) is None
    # A head that trains nothing.
    assert ray_of([node("0", 0), node("1", 8), node("2", 8)]).lacks(config(2, 8)) is None


@pytest.mark.parametrize("second", [node("2", 4), node("2", 8, alive=False)])
def test_a_node_that_is_too_small_or_dead_is_missing(ray_of, second):
    lacks = ray_of([node("1", 8), second]).lacks(config(2, 8))
    assert lacks == "2 nodes with 8 accelerators each; the cluster has 1 of these"


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("reward.reward_model", {"reward": {"reward_model": {"enable_resource_pool": True}}}),
        ("actor_rollout_ref.rollout", {"trainer": {"v1": {"trainer_mode": "separate_async"}}}),
        ("distillation", {"distillation": {"enabled": True}}),
        ("rollout", {}),
    ],
)
def test_nodes_of_all_resource_pools_are_waited_for(ray_of, key, settings):
    asked = OmegaConf.merge(config(2, 8), settings)
    OmegaConf.update(asked, f"{key}.nnodes", 1)
    OmegaConf.update(asked, f"{key}.n_gpus_per_node", 4)
    lacks = ray_of([node("1", 8), node("2", 8)]).lacks(asked)
    groups = f"2 nodes with 8 accelerators each (trainer) and 1 node with 4 accelerators each ({key})"
    assert lacks == f"{groups}; the cluster has 2 of these"
    (finding,) = ray_of([node("1", 8), node("2", 8)]).check_devices(asked)
    assert not finding.ok
    assert f"{key}.nnodes=1 x {key}.n_gpus_per_node=4" in finding.found
    three = [node("1", 8), node("2", 4), node("3", 8)]
    assert ray_of(three).lacks(asked) is None
    assert ray_of(three).check_devices(asked)[0].ok
    assert ray_of(three, free=19).lacks(asked) == "20 free accelerators; 19 of the cluster's 20 are free"


def test_a_pool_that_is_not_used_is_not_waited_for(ray_of):
    asked = OmegaConf.merge(config(2, 8), {"reward": {"reward_model": {"enable_resource_pool": False, "nnodes": 4}}})
    asked = OmegaConf.merge(asked, {"trainer": {"v1": {"trainer_mode": "sync"}}})
    OmegaConf.update(asked, "actor_rollout_ref.rollout.nnodes", 3)
    assert ray_of([node("1", 8), node("2", 8)]).lacks(asked) is None


def test_accelerators_that_another_run_still_holds_are_waited_for(ray_of):
    lacks = ray_of([node("1", 8), node("2", 8)], free=9).lacks(config(2, 8))
    assert lacks == "16 free accelerators; 9 of the cluster's 16 are free"


def test_another_run_of_verl_on_the_cluster_is_waited_for(ray_of):
    """TransferQueue's actor has one name in one namespace: a second trainer would take the first one's data."""
    assert "TransferQueueController" in ray_of([node("1", 8)], actors=[QUEUE_ACTOR]).lacks(config(1, 4))


def test_the_queues_actor_has_the_name_that_transfer_queue_gives_it():
    interface = pytest.importorskip("transfer_queue.interface")
    source = Path(interface.__file__).read_text()
    assert f'name="{QUEUE_ACTOR["name"]}", namespace="{QUEUE_ACTOR["namespace"]}"' in source


def test_too_few_logical_cpus_on_a_node_are_an_error_since_verl_would_wait_for_them_for_ever(ray_of):
    (finding,) = ray_of([node("1", 8, cpus=24), node("2", 8, cpus=23)]).check_devices(config(2, 8))
    assert not finding.ok
    assert finding.found == "each node needs 24 logical CPUs; the nodes have 24, 23"
    assert "--num-cpus" in finding.remedy
    (finding,) = ray_of([node("1", 8, cpus=24), node("2", 8, cpus=24)]).check_devices(config(2, 8))
    assert finding.ok


def test_dead_nodes_are_named_when_accelerators_are_missing(ray_of):
    (finding,) = ray_of([node("1", 8), node("2", 8, alive=False)]).check_devices(config(2, 8))
    assert not finding.ok
    assert finding.found.endswith("the nodes of the cluster have 8; these nodes have died: 10.0.0.2")
    (finding,) = ray_of([node("1", 8)]).check_devices(config(2, 8))
    assert not finding.ok
    assert "died" not in finding.found


def test_dead_nodes_and_living_nodes_are_distinguished(ray_of):
    cluster = ray_of([node("1", 8), node("2", 8, alive=False)])
    assert cluster.living_nodes() == {"1"}
    assert cluster.dead_nodes() == {"2": "10.0.0.2"}


def test_joining_a_cluster_leaves_the_handlers_of_signals_alone(monkeypatch):
    """Ray replaces that of SIGTERM, by which a launcher is told that its job is preempted."""
    import signal

    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, lambda *_: None))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with Cluster.join(None):
        assert signal.getsignal(signal.SIGTERM) is before


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_file_that_a_node_does_not_have_is_named_with_its_key(tmp_path):
    here = tmp_path / "train.parquet"
    here.touch()
    files = [("data.train_files", str(here)), ("data.val_files", str(tmp_path / "test.parquet"))]
    ((found, remedy),) = _file_problems(files, None)
    assert found == f"data.val_files={tmp_path / 'test.parquet'} does not exist on this node"
    assert "every node" in remedy


def test_a_run_directory_that_is_not_shared_is_found_and_one_that_is_is_not(tmp_path):
    token = tmp_path / "shared"
    ((found, remedy),) = _file_problems([], str(token))
    assert "is not shared with this node, or does not exist" in found
    assert "--run-dir" in remedy
    token.touch()
    assert _file_problems([], str(token)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_a_run_directory_that_a_node_cannot_write_to_is_found(tmp_path, monkeypatch):
    import tempfile

    def refuse(dir):
        raise PermissionError("read-only file system")

    (tmp_path / "shared").touch()
    # Root may write anywhere.
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    ((found, _),) = _file_problems([], str(tmp_path / "shared"))
    assert "is not writable: PermissionError: read-only file system" in found


def test_the_files_of_a_config_are_those_that_are_on_this_machine(tmp_path):
    for name in ("train.parquet", "reward.py"):
        (tmp_path / name).touch()
    given = OmegaConf.create(
        {
            "actor_rollout_ref": {"model": {"path": "Qwen/Qwen2.5-1.5B-Instruct"}},
            "data": {"train_files": [str(tmp_path / "train.parquet")], "val_files": "hdfs://data/test.parquet"},
            "reward": {"custom_reward_function": {"path": str(tmp_path / "reward.py")}},
        }
    )
    assert local_files(given) == [
        ("data.train_files", str(tmp_path / "train.parquet")),
        ("reward.custom_reward_function.path", str(tmp_path / "reward.py")),
    ]
