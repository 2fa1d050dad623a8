"""`hg.check` refuses every wrong solver of the table and confirms right ones."""

from __future__ import annotations

import pytest

from hypergrad._solver import usable
from tests._helpers import tol
from tests.mutations._check_bugs import BUGS, INPUTS, SOLVERS, STALE, UNTRAINED, cases, error_of, planted
from tests.mutations._right_solvers import right_solvers

# One of each family; every other kind is in the whole table.
EIGHT = (
    "sign of the smallest leaf",
    "first two entries exchanged",
    "smallest entry zero",
    "direct term dropped",
    "T1-T2",
    "in other coordinates: times λ",
    STALE,
    UNTRAINED,
)
SHOWS = tol(1e-3, 1e-2)  # an error that a check in this precision promises to find


@pytest.fixture(scope="module")
def ridge():
    case = next(cases())
    return case, planted(case, EIGHT)


def test_the_table_is_large_and_its_names_are_known():
    assert len(BUGS) >= 40 and len(set(BUGS)) == len(BUGS) and len(SOLVERS) == 5
    assert set(EIGHT) <= set(BUGS) and set(INPUTS) <= set(BUGS)


@pytest.mark.parametrize("bug", EIGHT)
def test_a_planted_bug_is_refused(ridge, bug):
    case, make = ridge
    assert not case.check(make(bug)).ok


def test_the_same_program_without_a_bug_is_confirmed(ridge):
    case, make = ridge
    assert case.check(make(None)).ok and case.check(make(None, bare=True)).ok


def test_a_bare_solver_that_trains_on_from_where_it_ended_is_at_no_saddle():
    (case,) = (case for case in cases() if case.name == "trained")
    assert case.check(planted(case, ())(None, bare=True)).ok


@pytest.mark.table
@pytest.mark.parametrize("name", SOLVERS)
def test_every_planted_bug_is_refused(name):
    (case,) = (case for case in cases() if case.name == name)
    make = planted(case)
    missed, shown = [], 0
    for bug in BUGS:
        for bare in (False, True):
            solver = make(bug, bare)
            if bug not in INPUTS and error_of(case, solver) <= SHOWS:
                continue  # this one changes nothing here
            shown += 1
            missed += [(bug, bare)] if case.check(solver).ok else []
    assert case.check(make(None)).ok and case.check(make(None, bare=True)).ok
    assert shown >= 80 and not missed


@pytest.mark.table
def test_right_solvers_are_confirmed():
    reports = [(name, call()) for name, call in right_solvers()]
    # One that says itself that it did not get there is not right.
    reports = [(name, report) for name, report in reports if usable(report.info.status)]
    alarms = [(name, report) for name, report in reports if not report.ok]
    assert len(reports) >= 200
    assert len(alarms) <= 1, alarms
