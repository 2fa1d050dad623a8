"""No fault is silent: whatever goes wrong, a status or the error estimate says so, and nobody else's result changes.

The faults that are values here, each through one compiled program a solver; `experiments/reliability` runs all of them
through all solvers, in every mode. Those that are mistakes of the caller are in `test_mistakes.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest

from hypergrad import Status
from tests.reliability._faults import FAULTS, Outcome, judge
from tests.reliability._harness import Batch, in_a_batch, one_by_one
from tests.reliability._methods import METHODS

FAST = (
    "implicit, CG",
    "implicit, Neumann, own step size",
    "fixed point, GMRES",
    "unrolled, reverse",
    "unrolled, truncated",
)
NAMED = {"implicit, CG": lambda fault: fault.status, "unrolled, reverse": lambda fault: fault.path}


@pytest.fixture(scope="module", params=FAST)
def batch(request) -> tuple[str, Batch]:
    return request.param, in_a_batch(request.param, FAULTS)


def test_no_fault_is_silent(batch):
    name, found = batch
    silent = [(f.what, str(o)) for f, o in zip(FAULTS, found.outcomes, strict=True) if o.silent]
    assert not silent, f"{name}: {silent}"


def test_each_fault_has_the_status_that_names_it(batch):
    name, found = batch
    for fault, outcome in zip(FAULTS, found.outcomes, strict=True):
        expected = fault.others.get(name, NAMED[name](fault) if name in NAMED else outcome.status)
        assert outcome.status in (expected, *fault.rounded), f"{name}, {fault.what}: {outcome}"


def test_what_looks_usable_is_as_accurate_as_it_says(batch):
    name, found = batch
    for fault, outcome in zip(FAULTS, found.outcomes, strict=True):
        if outcome.status == Status.OK and math.isfinite(outcome.error):
            assert outcome.error <= max(outcome.estimate, 1e-3), f"{name}, {fault.what}: {outcome}"


def test_a_bad_member_changes_no_bit_of_the_others(batch):
    assert batch[1].same
    assert batch[1].good


def test_the_state_can_be_used_again_after_every_fault(batch):
    assert all(batch[1].finite), [f.what for f, fine in zip(FAULTS, batch[1].finite, strict=True) if not fine]


def test_alone_under_jit_the_outcome_is_that_of_the_batch():
    alone = one_by_one("unrolled, forward", FAULTS, jit=True)
    for fault, outcome in zip(FAULTS, alone, strict=True):
        assert outcome.status == fault.path, f"{fault.what}: {outcome}"
        assert not outcome.silent, f"{fault.what}: {outcome}"


def test_without_jit_the_outcome_is_that_of_the_batch():
    for fault, outcome in zip(FAULTS[4:6], one_by_one("direct", FAULTS[4:6], jit=False), strict=True):
        assert outcome.status in (fault.status, *fault.rounded)
        assert not outcome.silent


class _Info(NamedTuple):
    status: int
    error_estimate: float


class _Out(NamedTuple):
    grad: float
    info: _Info


@pytest.mark.parametrize(
    ("status", "grad", "estimate", "exact", "silent"),
    [
        (Status.OK, 1.2, 1e-6, 1.0, True),
        (Status.PRECISION_LIMITED, 1.2, 1e-6, 1.0, True),
        (Status.INSENSITIVE, 0.0, 1e-6, 1.0, True),
        (Status.OK, math.nan, 1e-6, 1.0, True),
        (Status.OK, math.nan, 1e-6, math.nan, True),
        (Status.OK, 1.0, 1e-6, math.inf, True),
        (Status.OK, 1.0, math.nan, math.inf, True),
        (Status.OK, 1.2, 0.5, 1.0, False),
        (Status.OK, 1.2, math.inf, 1.0, False),
        (Status.NEG_CURVATURE, 1.2, 1e-6, 1.0, False),
        (Status.OK, 1.01, 1e-6, 1.0, False),
        (Status.OK, 1.2, 1e-6, math.nan, False),
    ],
)
def test_the_judge_calls_silent_what_is_wrong_looks_usable_and_says_nothing(status, grad, estimate, exact, silent):
    out: Any = _Out(grad, _Info(int(status), estimate))
    assert judge(out, exact, 1.0).silent == silent


def test_every_outcome_can_be_printed_in_one_line():
    assert str(Outcome(Status.SINGULAR, math.inf, 1.0)) == "SINGULAR"
    assert str(Outcome(Status.OK, math.nan, 0.0)) == "OK, finite"
    assert str(Outcome(Status.OK, 1e-14, 1e-12)) == "OK"
    assert str(Outcome(Status.OK, 0.2, 0.5)) == "OK, error 2e-01, says 5e-01"


def test_the_solvers_of_the_fast_run_are_among_all():
    assert set(FAST) <= set(METHODS)
    assert all(set(fault.others) <= set(METHODS) for fault in FAULTS)
