"""``make gpu-proof`` where there is no GPU: what it finds and writes, how it resumes, and what it says it lacks."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import _measure
from benchmarks.__main__ import measure
from benchmarks.gpu import exactness
from hpo_plugin import algorithm, fused

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu.md"
SMALL = ((1, 1), (48, 65))


@pytest.fixture
def script(load_script):
    return load_script("gpu_proof")


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.fixture
def in_process(script, monkeypatch):
    """Measurements in this process, so that a planted error reaches them, with small batches."""
    every = exactness.compare

    def measured(name, *, package, limit=None, arguments=()):
        rows = importlib.import_module(f"{package}.{name}").run(*arguments)
        return {"status": "ok", "rows": rows, "error": None, "seconds": 1.0}

    monkeypatch.setattr(exactness, "compare", lambda device: every(device, SMALL))
    monkeypatch.setattr(script, "measure", measured)


# --- what the machine lacks ----------------------------------------------------------------------------------------


def test_without_cuda_the_command_stops_with_what_is_missing_and_what_to_do(script, without_cuda, tmp_path, capsys):
    assert script.main([f"--output={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: there is no CUDA: torch {torch.__version__} is a build without it. Install ")
    assert 'make gpu-proof ARGS="--device cpu"' in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_cuda_build_that_finds_no_gpu_names_driver_and_variable(script, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert re.search(r"built for CUDA 13\.0 and finds no GPU.*nvidia-smi.*CUDA_VISIBLE_DEVICES", script.missing("cuda"))
    assert script.missing("cpu") == ""


def test_without_torch_or_this_package_the_python_is_named(script, monkeypatch):
    monkeypatch.setattr(script, "installed", lambda module: module != "torch")
    assert script.missing("cpu").startswith(f"torch is not installed in {sys.executable}")
    monkeypatch.setattr(script, "installed", lambda module: True)

    def absent(name):
        raise script.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(script.metadata, "version", absent)
    assert "hpo-plugin is not installed" in script.missing("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the command asks for")
def test_make_runs_it_in_the_python_that_is_named_and_shows_no_traceback():
    # "ARGS=": a make that runs this test hands its own ARGS on.
    command = ["make", "gpu-proof", f"PYTHON={sys.executable}", "ARGS="]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "error: there is no CUDA" in done.stderr
    assert "Traceback" not in done.stderr


def test_training_that_lacks_a_package_is_reported_as_not_run(script, monkeypatch, tmp_path):
    def reason(*absent, device="cuda", engine="fsdp2"):
        monkeypatch.setattr(script, "installed", lambda module: module not in absent)
        return script.why_not_trained(script.parse([f"--device={device}", f"--engine={engine}"]))

    assert reason("verl") == "verl is not installed"
    assert reason("vllm") == "vLLM is not installed"
    assert reason("megatron", "mbridge", engine="megatron") == "megatron-core and mbridge are not installed"
    assert "fsdp2 only" in reason(device="cpu", engine="megatron")
    assert reason() == reason("vllm", device="cpu") == ""
    monkeypatch.setattr("hpo_plugin.cli.requirements.missing_packages", lambda extra: [f"of-{extra}"])
    assert reason() == 'of-study not installed: pip install "hpo-plugin[study]"'

    monkeypatch.setattr(script, "installed", lambda module: module != "vllm")
    result = script.train(script.parse([]), tmp_path, {})
    assert result == {"status": "not run", "rows": [], "error": "vLLM is not installed"}
    monkeypatch.setattr(script, "installed", lambda module: module != "verl")
    assert script.time_it("cpu")["error"] == "verl is not installed, with which to compare"


# --- correctness ---------------------------------------------------------------------------------------------------


def test_estimator_and_losses_are_right_in_every_type():
    rows = exactness.table(exactness.compare("cpu", SMALL))
    assert [row for row in rows if not row["met"]] == []
    quantities = {f"{loss}, {what}" for loss in ("hpo_loss", "surrogate_loss") for what in ("value", "gradient")}
    quantities |= {"advantages, hpo", "advantages, ahpo"}
    types = {"float64", "float32", "bfloat16", "float16"}
    assert {(row["quantity"], row["type"]) for row in rows} == set(product(quantities, types))
    # 9 batches of rewards; 2 shapes x 3 α x 2 clips, and one without tokens.
    assert {row["batches"] for row in rows} == {9, 13}


def test_the_plain_estimator_is_the_papers_by_hand():
    """One of four solved: mean 1/4, std 1/2, so 1.5 and −0.5; α = 1/3. The other group is solved by all."""
    rewards, groups = [[0.0, 1.0], [0.0], [0.0], [0.0], [1.0], [1.0]], [0, 0, 0, 0, 1, 1]
    weighted, _ = exactness.plain_advantages(rewards, groups, [True] * 6, "ahpo")
    assert weighted == pytest.approx([1.5, -0.5 / 3, -0.5 / 3, -0.5 / 3, 0, 0], abs=1e-5)
    weighted, _ = exactness.plain_advantages(rewards, groups, [True] * 6, "hpo")
    assert weighted == pytest.approx([1.5, -0.3, -0.3, -0.3, 0, 0], abs=1e-5)


def test_errors_are_in_units_of_the_tolerance_and_nan_is_the_worst():
    def worst(found, reference, tolerance):
        return exactness.worst(*(torch.tensor(x) for x in (found, reference, tolerance)))

    assert worst([1.0, 2.5], [1.0, 2.0], [0.5, 0.25]) == 2
    assert worst([math.inf], [math.inf], [0.0]) == 0
    for found, reference in ((math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0)):
        assert worst([found], [reference], [0.0]) == math.inf


def wrong_dual_clip(monkeypatch):
    right = fused.surrogate_loss
    monkeypatch.setattr(fused, "surrogate_loss", lambda *a, **k: right(*a, **{**k, "clip_dual": None}))


def wrong_by_a_hundred_thousandth(monkeypatch):
    right = fused.surrogate_loss

    def changed(*arguments, scale, **others):
        return right(*arguments, scale=scale * (1 + 1e-5), **others)

    monkeypatch.setattr(fused, "surrogate_loss", changed)


def half_precision_is_not_converted(monkeypatch):
    monkeypatch.setattr(algorithm, "_at_least_fp32", lambda x: x)


def alpha_of_the_wrong_sign(monkeypatch):
    def changed(signs, alpha):
        return torch.ones_like(signs).masked_fill(signs > 0, alpha)

    monkeypatch.setattr(algorithm, "hysteretic_weights", changed)


def biased_deviation(monkeypatch):
    right = algorithm.group_relative_advantage

    def changed(rewards, groups, **others):
        found = right(rewards, groups, **others)
        return found._replace(advantage=found.advantage * 1.00001)

    monkeypatch.setattr(algorithm, "group_relative_advantage", changed)


@pytest.mark.parametrize(
    ("plant", "quantity"),
    [
        (wrong_dual_clip, "surrogate_loss, gradient in bfloat16"),
        (wrong_by_a_hundred_thousandth, "surrogate_loss, value in float64"),
        (half_precision_is_not_converted, "hpo_loss, value in bfloat16"),
        (alpha_of_the_wrong_sign, "advantages, ahpo in float16"),
        (biased_deviation, "advantages, hpo in float32"),
    ],
)
def test_a_planted_error_is_found_and_ends_the_command_with_the_worst_case(
    plant, quantity, script, in_process, monkeypatch, tmp_path, capsys
):
    plant(monkeypatch)
    assert script.main(["--device=cpu", f"--output={tmp_path}"]) == 1
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "correctness.json").read_text())
    assert result["status"] == "failed"
    assert quantity in {f"{row['quantity']} in {row['type']}" for row in result["rows"] if not row["met"]}
    assert re.search(
        r"^correctness: failed: \d+ of 24 quantities are wrong on cpu\. The worst: .+, in the batch: ", said, re.M
    )
    worst = max(result["rows"], key=lambda row: math.inf if row["error"] is None else row["error"])
    assert f"The worst: {worst['quantity']} in {worst['type']}, " in result["error"]
    assert result["error"].endswith(worst["worst batch"])
    # Nothing is measured or trained with wrong mathematics, and the page says so.
    assert not (tmp_path / "timing.json").exists()
    page = (tmp_path / script.PAGE).read_text()
    assert "- Correctness: failed\n- Timing: not reached\n- Training: not reached" in page
    assert result["error"] in page


# --- timing --------------------------------------------------------------------------------------------------------


def test_a_ratio_is_the_median_of_rounds_with_an_interval_of_order_statistics():
    """Ten rounds: P(at most one of ten on a side) = 11/1024 ≤ 0.025 < 56/1024, so the second and the ninth."""
    times = [float(n) for n in (3, 1, 2, 5, 4, 8, 7, 6, 10, 9)]
    assert _measure.ratio(times, [2.0] * 10) == (2.75, 1.0, 4.5)
    with pytest.raises(ValueError, match="six are needed"):
        _measure.ratio([1.0] * 5, [1.0] * 5)


def test_an_accelerator_is_waited_for_before_and_within_the_measured_time():
    order = []
    calls = {"work": lambda: order.append("work")}
    times = _measure.rounds(calls, seconds=0, at_least=2, synchronize=lambda: order.append("wait"))
    assert order == ["work", *["wait", "work", "wait"] * 2]
    assert len(times["work"]) == 2


def test_ours_and_verls_are_timed_in_turns_with_shares_of_the_bandwidth(monkeypatch):
    pytest.importorskip("verl")
    from benchmarks.gpu import timing

    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "COPIED", {"cpu": 1 << 20})
    monkeypatch.setattr(timing, "STEPS", {"cpu": ((32, 16),)})
    monkeypatch.setattr(timing, "MICRO_BATCHES", {"cpu": ((4, 16),)})
    rows = {row["name"]: row for row in timing.run("cpu")}
    assert rows["copy of 1 MiB"]["unit"] == "GB/s"
    for label, theirs in (
        ("advantages, 32 x 16", ("grpo", "grpo_vectorized")),
        ("advantages in verl's driver, 32 x 16", ("grpo", "grpo_vectorized")),
        ("policy loss, 4 x 16", ("vanilla",)),
    ):
        in_driver = "driver" in label
        assert ("of the copy bandwidth" in rows[f"{label}: ahpo"]["note"]) is not in_driver
        for name in theirs:
            ratio = rows[f"{label}: verl {name} / ahpo"]
            assert ratio["measured"] > 0
            assert re.fullmatch(r"95 % interval \S+ to \S+, 11 rounds", ratio["note"])


def test_a_measurement_gets_its_device_in_a_process_of_its_own():
    result = measure("environment", package="benchmarks.gpu", arguments=["cpu"])
    found = {row["name"]: row["found"] for row in result["rows"]}
    assert (result["status"], found["device"]) == ("ok", "cpu")
    assert found["torch"] == torch.__version__
    assert re.match(r"[0-9a-f]{40}|unknown", found["commit"])


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["fsdp2", "megatron"])
@pytest.mark.parametrize("task", ["countdown3", "telelogs"])
def test_every_task_model_and_engine_is_a_study_of_recipes_that_verl_accepts(script, task, engine, tmp_path):
    pytest.importorskip("verl")
    from hpo_plugin.check.checks import check_algorithm, check_by_verl, check_recipe
    from hpo_plugin.check.compose import compose
    from hpo_plugin.study.spec import load_study

    for model in script.MODELS:
        given = script.parse([f"--task={task}", f"--engine={engine}", f"--model={model}", "data.gen_batch_size=16"])
        overrides = script.recipe_overrides(given, tmp_path)
        # A GPU of 80 GB holds all of them.
        memory = script.memory_overrides(overrides, 79 * 2**30)
        study = load_study(script.declare_study(given, tmp_path, memory))
        cells = study.cells()
        assert (study.steps, study.test_every, study.save_every) == (100, 10, 20)
        assert [dict(o.split("=", 1) for o in cell.overrides)["algorithm.policy_loss"] for cell in cells] == [
            "grpo",
            "ahpo",
        ]
        for cell in cells:
            config, finding = compose(cell.config_name, cell.overrides)
            assert config is not None, finding
            for checked in (*check_algorithm(config), *check_recipe(config), check_by_verl(config)):
                assert checked.ok, (model, checked)
            assert (config.recipe.task, config.recipe.model, config.recipe.engine) == (task, model, engine)
            assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (1, 1)
            assert config.actor_rollout_ref.model.path == f"Qwen/Q{model[1:].replace('b', 'B')}-Instruct"
            assert config.data.train_files == f"{tmp_path}/data/{task}/train.parquet"
            assert config.data.gen_batch_size == 16


def test_the_small_models_architecture_has_the_published_number_of_parameters(script):
    """494,032,768, as the page of Qwen2.5-0.5B-Instruct counts them."""
    pytest.importorskip("verl")
    from hpo_plugin.check.compose import compose
    from hpo_plugin.recipe.memory import Sizes

    config, finding = compose("hpo_recipe", script.MODELS["qwen2.5-0.5b"])
    assert config is not None, finding
    assert Sizes.of(config).architecture.parameters == 494_032_768


def test_memory_settings_follow_the_gpu(script, tmp_path):
    pytest.importorskip("verl")
    gib = 2**30

    def settings(size, *arguments):
        given = script.parse(list(arguments))
        return script.memory_overrides(script.recipe_overrides(given, tmp_path), size * gib)

    assert settings(79) == ["recipe.offload=False", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384"]
    # Gradients in fp32 beside vLLM: 79.3 GiB to generate.
    assert settings(79, "--engine=megatron")[0] == "recipe.offload=True"
    assert settings(48, "--engine=megatron")[1].endswith("=8192")
    with pytest.raises(script.StageError, match=r"the GPU has 24 GiB\. Take --model qwen2\.5-0\.5b"):
        settings(24)
    assert settings(24, "--model=qwen2.5-0.5b")[0] == "recipe.offload=True"
    # Who sets them is believed.
    assert settings(24, "recipe.offload=True") == []


def test_data_are_made_where_the_recipe_looks_for_them(script, tmp_path):
    script.prepare_data("countdown3", "synthetic", tmp_path)
    rows = pq.read_table(tmp_path / "data" / "countdown3" / "train.parquet").to_pylist()
    assert len(rows) == 20_000
    assert {len(row["reward_model"]["ground_truth"]["numbers"]) for row in rows} == {3}
    with pytest.raises(script.StageError, match="data of telelogs: "):
        script.prepare_data("telelogs", str(tmp_path / "nothing.csv"), tmp_path)


def test_a_rehearsal_is_the_recipe_on_the_cpu_backend(script, tmp_path):
    pytest.importorskip("verl")
    from hpo_plugin.check.compose import compose
    from hpo_plugin.study.spec import load_study

    for task in script.TASKS:
        given = script.parse(["--device=cpu", f"--task={task}", "--steps=3"])
        study = load_study(script.declare_study(given, tmp_path, []))
        assert (study.test_every, study.save_every, study.environment) == (1, 1, {"VERL_PLATFORM": "cpu"})
        for cell in study.cells():
            assert cell.config_name == "hpo_recipe"
            config, finding = compose(cell.config_name, cell.overrides)
            assert config is not None, finding
            assert config.actor_rollout_ref.rollout.name == "hf_cpu"


def test_a_finished_training_is_a_row(script):
    from hpo_plugin.study.data import ALPHA, HELD_OUT, REWARD, STEP_SECONDS

    nan = math.nan
    values = {
        HELD_OUT: [0.1, nan, 0.2, nan, 0.3],
        REWARD: [nan, 0.1, 0.2, 0.3, 0.4],
        ALPHA: [nan, 0.1, 0.2, 0.3, 0.5],
        STEP_SECONDS: [nan, 9.0, 2.0, 3.0, 4.0],
    }
    run = SimpleNamespace(values={k: np.array(v) for k, v in values.items()}, info={"attempts": 2})
    assert script.training_row(["hpo/task=countdown3", "algorithm.policy_loss=ahpo"], 4, run) == {
        "algorithm": "ahpo",
        "steps": 4,
        "held-out success, before": 0.1,
        "after": 0.3,
        "mean reward, first tenth of the steps": 0.1,
        "last tenth": 0.4,
        "α, last step": 0.5,
        "seconds of a step, median": 3.5,
        "attempts": 2,
    }


# --- stages, and the page ------------------------------------------------------------------------------------------


@pytest.fixture
def stages(script, monkeypatch):
    """Stages that note their names; results by name, to be changed."""

    def result(status, *rows, error=None):
        return {"status": status, "rows": list(rows), "error": error}

    fake = SimpleNamespace(ran=[])
    fake.results = {
        "environment": result("ok", {"name": "GPU", "found": "a GPU"}),
        "correctness": result("ok", {"quantity": "loss", "error": 0.5, "met": True}),
        "timing": result("ok", {"name": "copy", "measured": 3000.0, "bar": ""}),
        "training": result("not run", error="vLLM is not installed"),
    }

    def run(name):
        fake.ran.append(name)
        return dict(fake.results[name])

    fake.run = run
    monkeypatch.setattr(script, "missing", lambda device: "")
    monkeypatch.setattr(script, "measure", lambda name, **_: fake.run(name))
    monkeypatch.setattr(script, "check_exactness", lambda device: fake.run("correctness"))
    monkeypatch.setattr(script, "time_it", lambda device: fake.run("timing"))
    monkeypatch.setattr(script, "train", lambda given, folder, facts: fake.run("training"))
    return fake


def test_a_second_call_runs_only_what_is_not_done_and_what_has_changed(script, stages, tmp_path, capsys):
    def ran(*arguments):
        stages.ran.clear()
        assert script.main([f"--output={tmp_path}", *arguments]) == 0
        return stages.ran

    assert ran() == ["environment", "correctness", "timing", "training"]
    capsys.readouterr()
    # What lacked a package is tried again.
    assert ran() == ["environment", "training"]
    assert "correctness: done before" in capsys.readouterr().out
    stages.results["training"] = {"status": "ok", "rows": [{"algorithm": "ahpo"}], "error": None}
    assert ran() == ["environment", "training"]
    assert ran() == ["environment"]
    # Another GPU, driver, version or commit.
    stages.results["environment"]["rows"] = [{"name": "GPU", "found": "another GPU"}]
    assert ran() == ["environment", "correctness", "timing"]
    # Another training.
    assert ran("--steps=50") == ["environment", "training"]
    # A file that a crash left half written counts as none.
    (tmp_path / "timing.json").write_text('{"status": "o')
    assert ran("--steps=50") == ["environment", "timing"]


def test_a_failed_training_ends_the_command_with_1_and_is_tried_again(script, stages, tmp_path):
    stages.results["training"] = {"status": "failed", "rows": [], "error": "grpo: out of memory"}
    for expected in (["environment", "correctness", "timing", "training"], ["environment", "training"]):
        stages.ran.clear()
        assert script.main([f"--output={tmp_path}"]) == 1
        assert stages.ran == expected
    assert "**Failed.**\n\n```text\ngrpo: out of memory\n```" in (tmp_path / script.PAGE).read_text()


def test_an_interrupt_ends_with_its_status_and_keeps_what_is_done(script, stages, tmp_path, monkeypatch, capsys):
    def interrupted(device):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(script, "time_it", interrupted)
    assert script.main([f"--output={tmp_path}"]) == 143
    assert "Stopped by SIGTERM; the same command resumes." in capsys.readouterr().out
    assert json.loads((tmp_path / "correctness.json").read_text())["status"] == "ok"
    assert not (tmp_path / "timing.json").exists()


def test_the_page_shows_every_stage_with_its_table_and_what_was_not_run(script, stages, tmp_path):
    given = script.parse([f"--output={tmp_path}", "--task=telelogs", "--engine=megatron", "data.train_batch_size=8"])
    page = script.page(stages.results, given, tmp_path)
    assert page.startswith("# GPU proof: telelogs, qwen2.5-1.5b, megatron\n")
    assert "- Environment: ok\n- Correctness: ok\n- Timing: ok\n- Training: not run\n" in page
    assert "| quantity | error | met |\n|---|---|---|\n| loss | 0.5 | yes |" in page
    # A column without values is left out.
    assert "| name | measured |\n|---|---|\n| copy | 3,000 |" in page
    assert "Not run: vLLM is not installed." in page
    assert "rehears" not in page
    # The command on the page means the same call.
    words = shlex.split(re.search(r'ARGS="([^"]+)"', page)[1])
    assert vars(script.parse(words)) == vars(given)

    stages.results["training"] = {"status": "ok", "rows": [{"algorithm": "ahpo", "steps": 100}], "error": None}
    picture = tmp_path / "report" / "training" / "pair-reward.png"
    picture.parent.mkdir(parents=True)
    picture.touch()
    page = script.page(stages.results, given, tmp_path)
    assert "| ahpo | 100 |" in page
    assert "![pair-reward](report/training/pair-reward.png)" in page
    assert "pair-alpha" not in page


def test_the_page_of_a_rehearsal_says_that_it_is_none_of_a_gpu(script, stages, tmp_path):
    page = script.page(stages.results, script.parse(["--device=cpu"]), tmp_path)
    assert "**A rehearsal without a GPU, with a small model: nothing here is a result of a GPU.**" in page


# --- the run over two nodes ----------------------------------------------------------------------------------------


def finished_run(folder, *, nodes=2, resumed_from=(None, 2), alpha=None, steps=4, missing=()):
    """The run directory of a launch."""
    (folder / "attempt-1" / "hydra" / ".hydra").mkdir(parents=True)
    config = f"trainer: {{nnodes: {nodes}}}\nalgorithm: {{hpo: {{alpha_min: 0.1}}}}\n"
    (folder / "attempt-1" / "hydra" / ".hydra" / "config.yaml").write_text(config)
    for number, step in enumerate(resumed_from, start=1):
        (folder / f"attempt-{number}").mkdir(exist_ok=True)
        (folder / f"attempt-{number}" / "attempt.json").write_text(json.dumps({"resumed_from": step}))
    data = {
        "actor/hpo/share_positive": 0.2,
        "actor/hpo/share_negative": 0.5,
        "actor/hpo/alpha": 0.4 if alpha is None else alpha,
        "actor/grad_norm": 1.0,
    }
    rows = [{"step": 0, "data": {}}, *({"step": n, "data": data} for n in range(1, steps + 1) if n not in missing)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "result.json").write_text(json.dumps({"steps": steps}))
    return folder


def test_a_run_that_lost_a_node_and_resumed_is_accepted(script, tmp_path, capsys):
    assert script.main([f"--accept={finished_run(tmp_path / 'run')}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("ok  ") for line in lines)
    assert "attempts began from [None, 2]" in lines[2]


@pytest.mark.parametrize(
    ("wrong", "criterion"),
    [
        ({"nodes": 1}, "trainer.nnodes is 2 or more (1)"),
        ({"missing": (3,)}, "every step from 1 to 4 is logged once"),
        ({"resumed_from": (None,)}, "a later attempt resumed from a checkpoint (attempts began from [None])"),
        # α of one rank, whose shares are others.
        ({"alpha": 0.5}, "α of every step is clip(p̂⁺ / p̂⁻, α_min, 1) of its logged shares"),
        ({"alpha": math.nan}, "α of every step is clip(p̂⁺ / p̂⁻, α_min, 1) of its logged shares"),
    ],
)
def test_a_run_that_misses_a_criterion_is_not_accepted(wrong, criterion, script, tmp_path, capsys):
    assert script.main([f"--accept={finished_run(tmp_path / 'run', **wrong)}"]) == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")] == [f"FAIL  {criterion}"]


def test_a_run_that_is_not_finished_is_not_accepted(script, tmp_path, capsys):
    (finished_run(tmp_path / "run") / "result.json").unlink()
    assert script.main([f"--accept={tmp_path / 'run'}"]) == 1
    assert capsys.readouterr().out == "FAIL  the run is finished (result.json)\n"


# --- the documentation ---------------------------------------------------------------------------------------------


def test_the_commands_of_the_page_are_ones_that_the_script_takes(script):
    commands = re.findall(r'make gpu-proof PYTHON=\S+(?:[ \n]+ARGS="([^"]*)")?', PAGE.read_text())
    assert len(commands) >= 6
    for words in commands:
        script.parse(shlex.split(words))


def test_the_acceptance_run_of_the_page_is_a_recipe_over_16_gpus():
    pytest.importorskip("verl")
    from hpo_plugin.check.checks import check_algorithm, check_by_verl, check_recipe
    from hpo_plugin.check.compose import compose

    _, _, rest = PAGE.read_text().partition("\nacceptance=(\n")
    stated, *overrides = shlex.split(rest.partition("\n)\n")[0], comments=True)
    config, finding = compose(stated.removeprefix("--config-name="), overrides)
    assert config is not None, finding
    [recipe] = check_recipe(config)
    assert "on 16 GPUs: 16 data-parallel ranks" in recipe.found
    for checked in (recipe, *check_algorithm(config), check_by_verl(config)):
        assert checked.ok, checked
    # Killed after step 12, it resumes from step 10.
    assert config.trainer.save_freq == 5
    assert config.trainer.total_training_steps == 30


@pytest.mark.parametrize(
    "said",
    [
        "checked {checked}: {report.summary}",
        "the trainer failed: {error.cause}",
        "Ray lost {lost}",
        "waiting for {lacks}",
        "Ray has lost {lost}",
        "restarting the trainer, {self._failures} of {self.launch.retries} retries",
        "finished: {steps} steps in {len(attempts)} attempts",
    ],
)
def test_what_the_page_expects_in_the_log_is_what_the_launcher_says(said):
    """Up to the first value in it."""
    assert said in (ROOT / "hpo_plugin" / "runs" / "launch.py").read_text()
    assert said.partition("{")[0].strip() in PAGE.read_text()


# --- all of it -----------------------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_rehearsal_that_is_killed_in_the_second_training_is_resumed_there(tmp_path):
    """SIGKILL for the command alone: no trainer is left, and the second call trains what is missing."""
    pytest.importorskip("verl")
    from hpo_plugin.runs.directory import Run

    output, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "scripts/gpu_proof.py", "--device=cpu", "--steps=4", f"--output={output}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def cells(name):
        return [Run(path) for path in output.glob(f"training/cells/recipe-{name}-*")]

    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
        while not (found := cells("ahpo")) or 2 not in found[0].rows():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        process.kill()
        process.wait()
    assert [run.finished for run in (*cells("grpo"), *cells("ahpo"))] == [True, False]

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout + done.stderr
    # (They are repeated if somebody changed the code meanwhile.)
    assert done.stdout.count("done before") == 2 or "correctness: ok" in done.stdout
    attempts = {name: [attempt.resumed_from for attempt in cells(name)[0].attempts()] for name in ("grpo", "ahpo")}
    assert attempts["grpo"] == [None]
    assert attempts["ahpo"][0] is None
    assert attempts["ahpo"][1] in (1, 2, 3)
    rows = json.loads((output / "training.json").read_text())["rows"]
    assert [(row["algorithm"], row["steps"], row["attempts"]) for row in rows] == [("grpo", 4, 1), ("ahpo", 4, 2)]
    page = (output / "results.md").read_text()
    assert "- Training: ok" in page
    assert "![pair-reward](report/training/pair-reward.png)" in page
    assert shutil.which("git") is None or "| commit |" in page
