"""Every seeded bug still applies to the source, and none is there already."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutations._mutations import MUTATIONS
from tests.mutations.run import TABLE, known

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_a_seeded_bug_applies_and_is_still_a_program(mutation):
    source = (ROOT / "hypergrad" / mutation.file).read_text()
    assert source.count(mutation.old) == 1
    ast.parse(source.replace(mutation.old, mutation.new))
    assert all((ROOT / file).exists() for file in mutation.tests)


def test_there_are_enough_bugs_and_none_survived_that_was_planted():
    assert len(MUTATIONS) >= 30
    assert len({m.what for m in MUTATIONS}) == len(MUTATIONS)
    assert known(), "run python tests/mutations/run.py"
    assert "survived" not in TABLE.read_text()
