"""The notebook runs, and its .ipynb holds the same code."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).parents[2] / "notebooks" / "self_tuning.py"


@pytest.mark.usefixtures("once")
def test_the_notebook_runs_as_written(capsys):
    names = runpy.run_path(str(SOURCE))
    assert np.all(np.isfinite(names["result"].history.value))
    assert "best" in capsys.readouterr().out


def test_the_ipynb_holds_the_same_cells():
    cells = json.loads(SOURCE.with_suffix(".ipynb").read_text())["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = [line for line in SOURCE.read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in text.splitlines() if line and not line.startswith("#")] != []
    assert "\n".join(code).replace("\n", "") == text.replace("\n", "")
