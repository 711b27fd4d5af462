"""``hpo-plugin check`` fails loudly: what is broken on purpose is named, with what to do, and the exit status is 1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from rich.console import Console
from typer.testing import CliRunner

from hpo_plugin.check import checks
from hpo_plugin.check.cluster import Cluster, compare_node, ray_arguments, refuse_unreachable
from hpo_plugin.check.report import CheckReport, Finding
from hpo_plugin.cli.app import app

HERE = {
    "host": "head",
    "python": "3.11.7",
    "versions": {"hpo-plugin": "0.1.0", "verl": "0.9.1", "torch": "2.13.0"},
    "code": "abc",
    "problems": [],
    "built_in": None,
    "seconds": 1.0,
}


def there(**changes):
    return HERE | {"host": "node-2", "seconds": 6.0} | changes


def failed(findings):
    return [finding for finding in findings if not finding.ok]


def run_check(*arguments, **environment):
    """The command in a process of its own: registration happens once per process."""
    return subprocess.run(
        [sys.executable, "-m", "hpo_plugin.cli", "check", "--json", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def problem_of(done, name="this process"):
    assert done.returncode == 1, done.stdout + done.stderr
    return next(check for check in json.loads(done.stdout)["checks"] if check["name"] == name and not check["ok"])


# --- the installation, broken on purpose ---------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_a_disabled_entry_point_fails_and_names_the_variable():
    problem = problem_of(run_check("--local", VERL_USE_EXTERNAL_PLUGINS="none"))
    assert problem["found"] == "VERL_USE_EXTERNAL_PLUGINS=none excludes the entry point hpo"
    assert "unset it" in problem["remedy"]


@pytest.mark.timeout(300)
def test_a_plugin_that_cannot_load_fails_with_the_reason_that_verl_swallows(tmp_path):
    (tmp_path / "wrapt.py").write_text("raise OSError('broken on purpose')\n")
    problem = problem_of(run_check("--local", PYTHONPATH=str(tmp_path)))
    assert "broken on purpose" in problem["found"]


@pytest.mark.timeout(300)
def test_a_name_that_another_package_holds_fails_and_names_the_package(tmp_path):
    (tmp_path / "rival.py").write_text(
        "import wrapt\n"
        "@wrapt.when_imported('verl.trainer.ppo.core_algos')\n"
        "def take(module):\n"
        "    def loss(*args): ...\n"
        "    module.POLICY_LOSS_REGISTRY['ahpo'] = loss\n"
    )
    (tmp_path / "sitecustomize.py").write_text("import rival\n")
    problem = problem_of(run_check("--local", PYTHONPATH=str(tmp_path)))
    assert "the name is registered by rival.take" in problem["found"]


def test_another_version_of_verl_is_tried(monkeypatch):
    import verl

    from hpo_plugin.verl import self_test

    monkeypatch.setattr(verl, "__version__", "0.10.0")
    assert not failed(checks.check_versions())
    finding = checks.check_self_test()
    assert (finding.name, finding.ok) == ("self-test", True)
    said = "advantages and gradient are correct with verl 0.10.0; this package was tested with verl "
    assert finding.found.startswith(said)
    monkeypatch.setattr(self_test, "self_test", lambda: "something moved")
    finding = checks.check_self_test()
    assert (finding.found, finding.ok) == ("something moved", False)
    assert finding.remedy.startswith("install verl ")


def test_a_missing_package_fails_with_the_command_that_installs_it(monkeypatch):
    real = checks.metadata.version

    def version(name):
        if name == "TransferQueue":
            raise checks.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(checks.metadata, "version", version)
    (finding,) = failed(checks.check_versions())
    assert finding.found == "not installed"
    # Which versions verl asks for, its metadata say; 0.9.0's say nothing.
    assert finding.remedy == f"pip install 'TransferQueue{checks.required_versions('TransferQueue')}'"


# --- the cluster ---------------------------------------------------------------------------------------------------


def test_a_head_that_does_not_answer_is_reported_within_seconds(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with Cluster.join(None) as cluster:
        cluster.ask_every_node()
        (finding,) = cluster.check_nodes(HERE, timeout=5)
    assert not finding.ok
    assert "no answer at 127.0.0.1:1" in finding.found
    assert "RAY_ADDRESS" in finding.remedy


def ray_init_that_fails(monkeypatch, *errors):
    import ray

    left = list(errors)

    def init(**arguments):
        if left:
            raise left.pop(0)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_what_refused_the_connection_is_said(monkeypatch):
    error = ConnectionError("Failed to connect")
    error.__cause__ = RuntimeError(
        "Traceback (most recent call last):\n  File ...\nAuthenticationError: token is missing"
    )
    ray_init_that_fails(monkeypatch, error)
    with Cluster.join(None) as cluster:
        (finding,) = cluster.check_nodes(HERE, timeout=5)
    assert finding.found.endswith("Failed to connect: AuthenticationError: token is missing")


@pytest.mark.parametrize(("failures", "ok"), [(1, True), (2, False)])
def test_a_machine_too_slow_to_start_ray_gets_a_second_try(monkeypatch, failures, ok):
    slow = Exception("The current node timed out during startup.")
    ray_init_that_fails(monkeypatch, *[slow] * failures)
    with Cluster.join(None) as cluster:
        assert (cluster.failure is None) is ok
    if not ok:
        assert "try again later" in cluster.failure.remedy


@pytest.mark.parametrize("address", [None, "auto", "local", ""])
def test_addresses_without_a_port_are_left_to_ray(address):
    refuse_unreachable(address)


def test_rays_arguments_are_found_before_anything_else_has_imported_verl():
    """The CPU backend's config counts logical GPUs and CPUs with resolvers, which verl's plugins register."""
    code = (
        "from hpo_plugin.check.cluster import ray_arguments\n"
        "from hpo_plugin.check.compose import compose\n"
        "config, finding = compose('countdown_cpu', ['actor_rollout_ref.model.path=x', 'data.train_files=y'])\n"
        "assert config is not None, finding\n"
        "arguments = ray_arguments(config)\n"
        "print(arguments['num_gpus'], arguments['num_cpus'])\n"
    )
    environment = os.environ | {"VERL_PLATFORM": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["1", "12"]


def test_rays_arguments_are_those_of_the_config():
    config = OmegaConf.create({"ray_kwargs": {"ray_init": {"address": "local", "num_cpus": 12}}})
    arguments = ray_arguments(config)
    assert (arguments["address"], arguments["num_cpus"]) == ("local", 12)


def test_a_node_like_this_one_passes():
    (finding,) = compare_node("node 10.0.0.2", HERE, there())
    assert finding.ok


def test_a_node_with_another_version_fails_and_names_both():
    versions = HERE["versions"] | {"verl": "0.9.0", "torch": None}
    found = [finding.found for finding in failed(compare_node("node", HERE, there(versions=versions)))]
    assert found == [
        "node-2: verl is 0.9.0, but 0.9.1 locally",
        "node-2: torch is not installed, but 2.13.0 locally",
    ]


def test_a_node_with_other_code_of_the_same_version_fails():
    (finding,) = failed(compare_node("node", HERE, there(code="def")))
    assert "the code differs from the local code (def, locally abc)" in finding.found


def test_a_node_where_the_plugin_is_broken_fails_with_its_own_words():
    (finding,) = failed(compare_node("node", HERE, there(problems=[("no wrapt", "install it")])))
    assert (finding.found, finding.remedy) == ("node-2: no wrapt", "install it")


@pytest.mark.timeout(600)
def test_a_fresh_ray_worker_reports_what_is_broken_there(tmp_path):
    (tmp_path / "runtime.yaml").write_text(
        "defaults:\n  - hpo_trainer\n  - _self_\n"
        "trainer: {n_gpus_per_node: 0}\n"
        "ray_kwargs: {ray_init: {num_cpus: 2, address: local, include_dashboard: false,\n"
        "  runtime_env: {env_vars: {VERL_USE_EXTERNAL_PLUGINS: none}}}}\n"
    )
    done = run_check("--config-name=runtime", f"--config-dir={tmp_path}", "--timeout=300")
    checks = json.loads(done.stdout)["checks"]
    (node,) = [check for check in checks if check["name"].startswith("node ")]
    assert "VERL_USE_EXTERNAL_PLUGINS=none excludes the entry point hpo" in node["found"]
    assert [check["ok"] for check in checks if check["name"] == "this process"] == [True]
    assert done.returncode == 1


# --- the config ----------------------------------------------------------------------------------------------------


def compose(*overrides, config_name="hpo_trainer"):
    config, finding = checks.compose(config_name, ["actor_rollout_ref.rollout.n=8", *overrides])
    assert finding.ok, finding
    return config


def test_a_config_of_ones_own_is_found_in_its_directory_and_only_there(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [hpo_trainer, _self_]\nalgorithm: {policy_loss: gspo}\n")
    config, finding = checks.compose("mine", [], tmp_path)
    assert config is not None, finding
    assert config.algorithm.policy_loss == "gspo"
    assert not checks.compose("mine", [])[1].ok


def test_the_algorithm_of_our_trainer_config_is_shown_with_what_distinguishes_it():
    algorithm, batch = checks.check_algorithm(compose())
    assert algorithm.ok
    assert algorithm.found == (
        "A-HPO: α = clip(p̂⁺ / p̂⁻, α_min, 1), alpha_min = 0.1; adv_estimator ahpo, loss_mode ahpo, "
        "aggregation token-mean, clip range [1-0.2, 1+0.2]"
    )
    assert (batch.name, batch.found) == ("α", "V1 sync trainer: α is computed from the step's rollout batch")


def test_an_algorithm_without_alpha_is_shown_under_its_own_name():
    (finding,) = checks.check_algorithm(compose("algorithm.policy_loss=gspo"))
    assert finding.found.startswith("gspo: no α; ")


def test_what_a_preset_sets_in_verls_stock_config_is_shown_and_the_config_stays_as_it_is():
    config = compose("+algorithm.policy_loss=ahpo", config_name="ppo_trainer")
    algorithm, _, *changes = checks.check_algorithm(config)
    assert algorithm.found.startswith("A-HPO")
    assert [change.found for change in changes] == [
        "algorithm.adv_estimator: gae -> ahpo",
        "actor_rollout_ref.actor.policy_loss.loss_mode: vanilla -> ahpo",
    ]
    assert config.algorithm.adv_estimator == "gae"


@pytest.mark.parametrize("estimator", ["grpo", "gae"])
def test_a_run_that_is_observed_and_not_changed_is_shown_so(estimator):
    overrides = [f"algorithm.adv_estimator={estimator}", "+algorithm.hpo.observe=true"]
    algorithm, observed = checks.check_algorithm(compose(*overrides, config_name="ppo_trainer"))
    assert algorithm.found.startswith("no α; ")
    assert (observed.name, observed.ok) == ("observe", True)
    assert observed.found.startswith("the run is observed and its update does not change: ")


def test_our_config_may_be_observed_too():
    algorithm, batch, observed = checks.check_algorithm(compose("+algorithm.hpo.observe=true"))
    assert algorithm.found.startswith("A-HPO")
    assert (batch.name, observed.name) == ("α", "observe")


def test_half_of_hpo_is_named():
    overrides = [
        "algorithm.adv_estimator=ahpo",
        "actor_rollout_ref.actor.policy_loss.loss_mode=sapo",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    ]
    findings = checks.check_algorithm(compose(*overrides, config_name="ppo_trainer"))
    assert any("the α of A-HPO without its normalization" in finding.found for finding in findings)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm.policy_loss=nonsense", "is not a preset"),
        ("algorithm.adv_estimator=hpo", "two different algorithms"),
        ("algorithm.hpo.alpha=0.5", "it is a setting of hpo"),
        ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean", "token-mean"),
        ("actor_rollout_ref.rollout.n=1", "actor_rollout_ref.rollout.n=1 trains nothing"),
        ("+algorithm.hpo.observe=1", "algorithm.hpo.observe=1 is not a boolean"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=kl_cov", "not homogeneous"),
    ],
)
def test_a_contradiction_is_printed_plainly(override, said):
    (finding,) = checks.check_algorithm(compose(override))
    assert not finding.ok
    assert said in finding.remedy


@pytest.mark.parametrize(
    ("name", "override"), [("no_such_config", "a=1"), ("hpo_trainer", "no.such.key=1"), ("hpo_trainer", "a=[1")]
)
def test_a_config_that_cannot_be_composed_is_a_finding_and_not_a_traceback(name, override):
    config, finding = checks.compose(name, [override])
    assert config is None
    assert not finding.ok
    assert name in finding.found


def parquet(path, rows):
    row = {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": "3 7 5=22:"}],
        "reward_model": {"ground_truth": {"target": 22, "numbers": [3, 7, 5]}},
        "extra_info": {"index": 0},
    }
    pq.write_table(pa.Table.from_pylist([row] * rows), path)
    return path


def data_config(train, val, batch=2, reward_path=None, reward_name="compute_score"):
    return OmegaConf.create(
        {
            "data": {"train_files": str(train), "val_files": str(val), "train_batch_size": batch},
            "reward": {
                "reward_model": {"enable": False},
                "custom_reward_function": {"path": reward_path, "name": reward_name},
                "reward_manager": {"name": "naive", "source": "register"},
            },
        }
    )


def test_data_files_are_counted(tmp_path):
    config = data_config(parquet(tmp_path / "a.parquet", 3), parquet(tmp_path / "b.parquet", 1))
    train, val = checks.check_data(config)
    assert (train.ok, val.ok) == (True, True)
    assert train.found.startswith("3 rows in ")


@pytest.mark.parametrize("column", ["prompt", "data_source", "reward_model", "extra_info"])
def test_a_column_that_verl_does_not_find_is_named(tmp_path, column):
    path = parquet(tmp_path / "a.parquet", 3)
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    config = data_config(path, path)
    train, val = checks.check_data(config)
    assert train.ok == val.ok == (column == "extra_info")
    if not train.ok:
        assert f"a.parquet has no column {column}" in train.found
        assert "hpo-plugin prepare" in train.remedy
        # A reward manager or a data set of the user's own may read other columns.
        config.reward.reward_manager.source = "importlib"
        assert checks.check_data(config)[0].ok == (column != "prompt")
        config.data.custom_cls = {"path": "mine.py"}
        assert checks.check_data(config)[0].ok


def test_a_renamed_prompt_column_is_looked_for_under_its_name(tmp_path):
    path = parquet(tmp_path / "a.parquet", 3)
    config = data_config(path, path)
    config.data.prompt_key = "question"
    assert "has no column question (data.prompt_key)" in checks.check_data(config)[0].found


def test_a_missing_file_an_unreadable_file_and_less_than_a_batch_fail(tmp_path):
    good = parquet(tmp_path / "a.parquet", 3)
    (tmp_path / "bad.parquet").write_text("text")
    train, _ = checks.check_data(data_config(tmp_path / "missing.parquet", good))
    assert "does not exist" in train.found
    _, val = checks.check_data(data_config(good, tmp_path / "bad.parquet"))
    assert "is not a parquet file" in val.found
    train, _ = checks.check_data(data_config(good, good, batch=4))
    assert train.found == "3 rows, fewer than one batch (data.train_batch_size=4)"
    assert not train.ok


def test_a_reward_function_is_loaded_and_tried_on_the_first_row(tmp_path):
    good = parquet(tmp_path / "a.parquet", 3)
    config = data_config(good, good, reward_path="pkg://hpo_plugin.tasks.countdown")
    finding = checks.check_reward(config)
    assert finding.ok, finding
    assert "returns 0 for an empty response to a row of 'countdown'" in finding.found


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def compute_score(**kwargs): return True", "returns 1 "),
        ("import numpy\ndef compute_score(**kwargs): return numpy.bool_(True)", "returns 1 "),
        ("import torch\ndef compute_score(**kwargs): return torch.tensor(0.5)", "returns 0.5 "),
        ("def compute_score(**kwargs): return {'score': 0.25, 'acc': False}", "returns 0.25 "),
        ("def compute_score(extra_info, **kwargs): return extra_info['num_turns']", "returns 2 "),
        ("def compute_score(extra_info, **kwargs): return len(extra_info['rollout_reward_scores'])", "returns 0 "),
        ("def compute_score(data_source, solution_str, ground_truth, extra_info): return 0", "returns 0 "),
        ("async def compute_score(**kwargs): return 0.75", "returns 0.75 "),
    ],
)
def test_what_verls_reward_manager_accepts_is_accepted(tmp_path, code, said):
    (tmp_path / "reward.py").write_text(code)
    good = parquet(tmp_path / "a.parquet", 1)
    finding = checks.check_reward(data_config(good, good, reward_path=str(tmp_path / "reward.py")))
    assert finding.ok, finding
    assert said in finding.found


def test_a_function_that_asks_a_reward_model_is_loaded_and_not_tried(tmp_path):
    """Verl's manager would give it ``reward_router_address``, which there is none of yet."""
    code = "def compute_score(reward_router_address, reward_model_tokenizer, **kwargs): return 1"
    (tmp_path / "reward.py").write_text(code)
    good = parquet(tmp_path / "a.parquet", 1)
    config = data_config(good, good, reward_path=str(tmp_path / "reward.py"))
    config.reward.reward_model.enable = True
    finding = checks.check_reward(config)
    assert finding.ok, finding
    assert "not called, because it uses a reward model" in finding.found


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def compute_score(**kwargs): return 'one'", "returns 'one' for an empty response"),
        ("def compute_score(**kwargs): return float('nan')", "returns nan for an empty response"),
        ("def compute_score(**kwargs): return None", "returns None for an empty response"),
        ("def compute_score(**kwargs): return {'points': 1}", "raises KeyError"),
        ("def other(**kwargs): return 1", "cannot be loaded"),
        ("raise ImportError('no such library')", "no such library"),
    ],
)
def test_a_reward_function_that_cannot_score_fails(tmp_path, code, said):
    (tmp_path / "reward.py").write_text(code)
    good = parquet(tmp_path / "a.parquet", 1)
    finding = checks.check_reward(data_config(good, good, reward_path=str(tmp_path / "reward.py")))
    assert not finding.ok
    assert said in finding.found


def test_a_data_source_that_verl_cannot_score_fails_and_names_the_key_to_set(tmp_path):
    good = parquet(tmp_path / "a.parquet", 1)
    finding = checks.check_reward(data_config(good, good))
    assert not finding.ok
    assert "reward.custom_reward_function.path" in finding.remedy


# --- the report ----------------------------------------------------------------------------------------------------


REPORT = CheckReport(
    [Finding("verl", "0.9.1"), Finding("node 10.0.0.2", "gpu-2: no answer", False, "look at the node")], seconds=7.4
)


def shown(report, **console):
    console = Console(record=True, width=70, file=open(os.devnull, "w"), **console)  # noqa: SIM115
    report.show(console)
    return console.export_text()


def test_without_a_terminal_it_is_one_plain_line_per_check_and_its_remedy():
    assert shown(REPORT).splitlines() == [
        "ok    verl           0.9.1",
        "FAIL  node 10.0.0.2  gpu-2: no answer",
        "      to do: look at the node",
        "1 of 2 checks failed (7 s)",
    ]


def test_on_a_terminal_it_is_a_table_with_the_same_words():
    text = shown(REPORT, force_terminal=True)
    for word in ("ok", "fail", "node 10.0.0.2", "→ look at the node", "1 of 2 checks failed"):
        assert word in text


def test_json_says_the_same():
    assert json.loads(REPORT.to_json()) == {
        "ok": False,
        "seconds": 7.4,
        "checks": [
            {"name": "verl", "found": "0.9.1", "ok": True, "remedy": ""},
            {"name": "node 10.0.0.2", "found": "gpu-2: no answer", "ok": False, "remedy": "look at the node"},
        ],
    }


def test_overrides_without_a_config_are_refused_and_the_exit_status_is_1(monkeypatch):
    monkeypatch.setattr(checks, "probe", lambda: HERE)
    result = CliRunner().invoke(app, ["check", "--local", "a=1"])
    assert result.exit_code == 1
    assert "add --config-name NAME" in result.output
    assert CliRunner().invoke(app, ["check", "--local"]).exit_code == 0


def test_the_hash_of_the_code_is_of_the_mathematics_and_the_whole_adapter(tmp_path, monkeypatch):
    """Two nodes with different copies of one version are told by it."""
    import shutil
    from importlib.util import find_spec

    from hpo_plugin.check.probe import _code_hash

    package = tmp_path / "hpo_plugin"
    shutil.copytree(Path(find_spec("hpo_plugin").origin).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: type("Spec", (), {"origin": str(package / "__init__.py")})
    )
    known = {_code_hash()}
    for name in ("algorithm.py", "fused.py", "variants.py", "verl/estimators.py", "verl/losses.py", "verl/seams.py"):
        with (package / name).open("a") as file:
            file.write("# another copy\n")
        known.add(_code_hash())
    assert len(known) == 7
    (package / "cli" / "app.py").write_text("")
    assert _code_hash() in known
