"""Traps of verl that the pull request names. A test here fails when verl no longer has the trap: then take it out."""

import importlib.util
import math
import os
from pathlib import Path

import pytest

pytest.importorskip("verl")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def traps():
    spec = importlib.util.spec_from_file_location("verl_traps", ROOT / "scripts/verl_traps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(300)
def test_a_plugin_that_cannot_load_is_dropped_in_silence(traps):
    said = traps.swallowed_plugin_error()
    assert "False" in said
    assert "dependency is missing" not in said


def test_the_override_of_the_sapo_example_is_refused(traps):
    assert "unexpected keyword argument 'tau_pos'" in traps.sapo_example_override()


def test_grpo_vectorized_ignores_its_switch(traps):
    grpo, vectorized = traps.unused_switch_of_grpo_vectorized()
    # Rewards 0 and 1: mean 1/2, standard deviation 0.7071.
    assert grpo == pytest.approx(0.5)
    assert vectorized == pytest.approx(0.5 / 0.70711, rel=1e-4)


def test_grpo_makes_signs_of_rounding(traps):
    assert traps.rounding_of_grpo() == pytest.approx([-0.0073917] * 8, rel=1e-4)


def test_the_mean_over_no_tokens_is_not_a_number(traps):
    loss, gradient = traps.mean_over_no_tokens()
    assert math.isnan(loss)
    assert gradient == 0


@pytest.mark.skipif("VERL_CHECKOUT" not in os.environ, reason="needs a git checkout of verl in VERL_CHECKOUT")
def test_the_slurm_template_takes_all_nodes_for_one(traps):
    assert traps.quoted_node_list_of_slurm(Path(os.environ["VERL_CHECKOUT"])) == ["", "node1\nnode2"]


def test_the_pull_request_names_each_trap(traps):
    text = (ROOT / "contrib/upstream/pull_request.md.in").read_text()
    found = text.partition("### Found on the way")[2].partition("###")[0]
    assert [line[:2] for line in found.splitlines() if line[:2].rstrip(".").isdigit()] == [f"{k}." for k in range(1, 7)]
