"""The self-tuning experiments run whole on tiny problems: every number of expected.json in its range."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests._scripts import run_script

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
pytestmark = pytest.mark.usefixtures("once")


@pytest.mark.parametrize("name", ["self_tuning_digits", "self_tuning_lstm", "hyper_layers"])
def test_smoke(name, tmp_path):
    folder = EXPERIMENTS / name
    done = run_script(folder / "run.py", "--smoke", "--json", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for key, (low, high) in json.loads((folder / "expected.json").read_text())["ranges"].items():
        assert low <= found[key] <= high, (key, found.get(key))
