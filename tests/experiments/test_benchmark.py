"""The benchmark runs whole on tiny problems: every key, every figure finite. What it measures is for the real run."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

from tests._scripts import run_script

RUN = Path(__file__).parents[2] / "experiments" / "benchmark" / "run.py"
BARS = ["V1", "V2", "V3", "V4", "V5", "V6", "V7", "V8", "V9", "V10", "V11", "V13"]
pytestmark = pytest.mark.experiment
NEEDED = {"V1": "jaxopt", "V2": "jaxopt", "V7": "optuna"}  # without which a bar cannot be judged


def _figures(value, path=""):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _figures(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _figures(inner, f"{path}[{i}]")
    else:
        yield path, value


@pytest.fixture(scope="module")
def smoke():
    done = run_script(RUN, "--smoke", "--seed", "0", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_last_line_is_one_json_object_with_every_bar(smoke):
    found = json.loads(smoke.splitlines()[-1])
    assert list(found) == BARS
    for name, bar in found.items():
        verdicts = [check["met"] for check in bar["checks"]]
        assert bar["met"] is (False if False in verdicts else None if None in verdicts else True), name
        assert all({"what", "measured", "sense", "bar", "met"} == set(check) for check in bar["checks"])


def test_every_figure_is_finite_where_the_peer_is_installed(smoke):
    found = json.loads(smoke.splitlines()[-1])
    for name, bar in found.items():
        for path, value in _figures(bar["figures"], name):
            # What reaches no target has no count, and the long unroll skips plain differentiation.
            if value is None and not path.endswith(("TPE solves", "auto against plain")):
                pytest.fail(f"{path} is not a finite number")
            assert isinstance(value, (str, bool, type(None))) or math.isfinite(value), path
        for check in bar["checks"]:
            if check["measured"] is None:  # for want of the peer that the bar needs, or that this row names
                wanted = {NEEDED.get(name), *check["what"].split()}
                assert wanted & set(bar["skipped"]), check["what"]


def test_what_does_not_depend_on_time_holds_in_small(smoke):
    found = json.loads(smoke.splitlines()[-1])
    checks = {check["what"]: check for bar in found.values() for check in bar["checks"]}
    for what in ("T1a-S: error of hypergrad", "T1b-S: error of hypergrad", "compilations over 20 outer steps"):
        assert checks[what]["met"], checks[what]
    assert found["V9"]["figures"]["largest relative difference"] < 1e-3
    assert found["V4"]["figures"]["T=50"]["auto against plain"] < 1e-4
    assert found["V11"]["figures"]["against plain"]["hypergrad"] < 1e-3
    assert found["V6"]["figures"]["relative gap of the losses"] < 1e-4
    hand, ours = found["V6"]["figures"]["inner and cg steps of the last step"].values()
    assert all(abs(a - b) <= 2 for a, b in zip(hand, ours, strict=True)), "the hand-written step does other work"


def test_table_names_what_is_not_installed(smoke):
    line = smoke.splitlines()[1]
    named = line.removeprefix("not installed, skipped: ").split(" (")[0].split(", ")
    for name in ("jaxopt", "lineax", "optimistix", "torch", "torchopt", "optuna"):
        assert (name in named) == (importlib.util.find_spec(name) is None)


def test_unknown_bar_is_refused_by_name():
    done = run_script(RUN, "--only", "V1,V99")
    assert done.returncode == 2
    assert "unknown V99" in done.stderr
