"""All sixty faults of the list are shown somewhere, and where is true."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.reliability._faults import FAULTS
from tests.reliability._index import ELSEWHERE
from tests.reliability._mistakes import MISTAKES

ROOT = Path(__file__).parents[2]


def test_every_fault_of_the_list_has_its_place():
    assert {f.number for f in FAULTS} | {m.number for m in MISTAKES} | set(ELSEWHERE) == set(range(1, 61))


@pytest.mark.parametrize("number", ELSEWHERE)
def test_what_shows_it_exists(number):
    file, name = ELSEWHERE[number][2].split("::")
    functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name in functions
