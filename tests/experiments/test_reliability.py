"""The promises run from the command line, in small; in full they take an hour."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests._scripts import run_script

RUN = Path(__file__).parents[2] / "experiments" / "reliability" / "run.py"
pytestmark = pytest.mark.experiment


def test_each_promise_is_a_figure_a_bar_and_a_verdict():
    done = run_script(RUN, "--smoke", "--json", "--only", "P12,P13,P14,P17,P18")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"P12", "P13", "P14", "P17", "P18", "seed", "seconds"}
    for name in ("P12", "P13", "P14"):
        figure, bar, met = found[name]
        assert isinstance(figure, str) and isinstance(bar, str) and met is True, found[name]


def test_an_unknown_promise_is_refused_by_name():
    done = run_script(RUN, "--only", "P1,P99")
    assert done.returncode == 2
    assert "unknown P99" in done.stderr
