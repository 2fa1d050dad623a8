"""Every seeded bug still applies to the source, and none is there already."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutations._mutations import MUTATIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_a_seeded_bug_applies_and_is_still_a_program(mutation):
    source = (ROOT / "hypergrad" / mutation.file).read_text()
    assert source.count(mutation.old) == 1
    ast.parse(source.replace(mutation.old, mutation.new))
    assert all((ROOT / file).exists() for file in mutation.tests)


def test_there_are_enough_bugs_and_the_table_is_of_these():
    assert len(MUTATIONS) >= 30
    assert len({m.what for m in MUTATIONS}) == len(MUTATIONS)
    rows = (Path(__file__).parent / "README.md").read_text().splitlines()[6:]
    listed = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    gone = set(listed) - {m.what for m in MUTATIONS}
    assert listed and not gone, f"run python tests/mutations/run.py: {gone} are no bugs any more"
    assert not any("survived" in row for row in rows)
