"""The faults that are values, with the outcome that each must have, and how an outcome is judged.

An outcome is silent, the one that must never happen, if a number that is wrong by more than a tenth looks usable and
nothing says otherwise: neither the status nor `error_estimate`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from hypergrad import Status
from tests._helpers import tol
from tests.reliability._family import FLAT, GOOD, TURN, Member

NAN = math.nan
WRONG = 0.1  # relative error from which a hypergradient is wrong
REPELS = tol(Status.OK, Status.UNROLL_EXPLODED)  # a saddle amplifies rounding by 1.2¹⁰⁰
SWAP = np.array([[0, 1.0, 0], [1.0, 0, 0], [0, 0, 1.0]])


class Fault(NamedTuple):
    """A fault, by its number in the list.

    Attributes:
        number: in the list of sixty.
        what: in words.
        member: the problem that has it.
        status: what implicit differentiation with conjugate gradients must say.
        path: what an unrolled run must say.
        others: what other methods must say, by name, where that is part of the fault.
        rounded: what each may say as well, since rounding decides.
    """

    number: int
    what: str
    member: Member
    status: Status = Status.OK
    path: Status = Status.OK
    others: dict[str, Status] = {}
    rounded: tuple[Status, ...] = ()


FAULTS: tuple[Fault, ...] = (
    Fault(
        1,
        "too few inner steps",
        Member(quartic=5.0, b=(7.0, -4.0, 11.0), inner={"max_steps": 1}),
        Status.INNER_MAX_STEPS,
    ),
    Fault(
        2,
        "learning rate above 2/L",
        Member(a=40.0 * GOOD),
        path=Status.INNER_DIVERGED,
        others=dict.fromkeys(
            ("implicit, SGD to a tolerance", "implicit, SGD and Neumann, fixed", "fixed point, GMRES"),
            Status.INNER_DIVERGED,
        ),
    ),
    Fault(3, "inner loss NaN after some steps", Member(wall=0.02), Status.NONFINITE_LOSS, Status.NONFINITE_LOSS),
    Fault(3, "inner loss NaN at once", Member(b=(NAN, 0.0, 1.0)), Status.NONFINITE_LOSS, Status.NONFINITE_LOSS),
    Fault(3, "outer loss NaN", Member(c=(NAN, 0.0, 1.0)), Status.NONFINITE_LOSS, Status.NONFINITE_LOSS),
    Fault(3, "outer loss infinite", Member(size=math.inf), Status.NONFINITE_LOSS, Status.NONFINITE_LOSS),
    Fault(4, "NaN only in the gradient", Member(trap=1.0), Status.NONFINITE_GRAD, Status.NONFINITE_GRAD),
    Fault(6, "CG with one step", Member(linear={"max_steps": 1}), Status.LINEAR_MAX_STEPS),
    Fault(
        7,
        "no curvature along the right-hand side",
        Member(a=SWAP, c=(1.0, 0.0, 0.0), solved=True),
        Status.NEG_CURVATURE,
        REPELS,
    ),
    Fault(8, "saddle", Member(a=np.diag([1.0, -1.0, 2.0]), solved=True), Status.NEG_CURVATURE, REPELS),
    Fault(9, "singular, with a solution", Member(a=FLAT, b=FLAT @ [1.0, 1.0, 0.0], c=FLAT @ [0.2, 1.0, 0.7])),
    Fault(
        10,
        "singular, without a solution",
        Member(a=FLAT, b=FLAT @ [1.0, 1.0, 0.0], c=(1.0, 1.0, 1.0)),
        Status.SINGULAR,
    ),
    Fault(
        12,
        "Neumann step size above 2/L",
        Member(a=40.0 * GOOD),
        path=Status.INNER_DIVERGED,
        others={"implicit, Neumann, own step size": Status.NEUMANN_DIVERGING},
    ),
    Fault(13, "tolerance, but two products", Member(linear={"max_steps": 2}), Status.LINEAR_MAX_STEPS),
    Fault(
        14,
        "condition number 1e10",
        Member(a=TURN @ np.diag([1.0, 1e-5, 1e-10]) @ TURN.T),
        Status.INNER_STALLED,
        rounded=tol((), (Status.INNER_DIVERGED,)),  # in float32 the smallest eigenvalue of the matrix is −4e-9
    ),
    Fault(15, "outer gradient zero", Member(c=(0.0, 0.0, 0.0))),
    Fault(16, "outer loss times 1e-30", Member(size=1e-30)),
    Fault(17, "outer loss times 1e30", Member(size=1e30)),
    Fault(19, "hyperparameter unused", Member(b=(0.0, 0.0, 0.0), direct=0.0), Status.INSENSITIVE, Status.INSENSITIVE),
    Fault(20, "kink of L1 in a smooth solver", Member(kink=5.0), Status.INNER_STALLED),
    Fault(20, "exactly on the kink of L1", Member(a=np.eye(3), b=(1.0, 2.0, 3.0), kink=2 * 0.37), Status.INNER_STALLED),
    Fault(21, "ReLU at exactly zero", Member(a=np.diag([1.0, 2.0, 3.0]), b=(0.0, 1.0, 1.0), hinge=1.0)),
    Fault(
        22,
        "chaotic training",
        Member(a=np.diag([-8.5, 1.0, 1.0]), quartic=5.0, start=(1.2, 0.1, 0.1)),
        path=Status.UNROLL_EXPLODED,
    ),
)


class Outcome(NamedTuple):
    """What came of a fault.

    Attributes:
        status: of the solver.
        error: relative error of the hypergradient; NaN where any finite number will do.
        estimate: what the solver says of that error.
    """

    status: Status
    error: float
    estimate: float

    @property
    def silent(self) -> bool:
        """Whether a wrong number looks usable and nothing says otherwise."""
        wrong = not self.error <= WRONG and not math.isnan(self.error)
        return self.status.usable and wrong and not self.estimate >= WRONG

    def __str__(self) -> str:
        if not self.status.usable:
            return self.status.name
        if math.isnan(self.error):
            return f"{self.status.name}, finite"
        if self.error <= max(self.estimate, tol(1e-6, 1e-3)) and self.error <= WRONG:
            return self.status.name
        return f"{self.status.name}, error {self.error:.0e}, says {self.estimate:.0e}"


def judge(out: Any, exact: float, size: float) -> Outcome:
    """Compare one hypergradient with the truth.

    Args:
        out: `hg.Hypergradient` of a scalar hyperparameter, concrete.
        exact: the truth, see `_family.truth`.
        size: scale of the outer loss, against which a truth of zero is measured.
    """
    status, grad = Status(int(out.info.status)), float(out.grad)
    if not math.isfinite(exact):
        return Outcome(status, exact if math.isfinite(grad) else math.inf, float(out.info.error_estimate))
    error = abs(grad - exact) / max(abs(exact), 1e-3 * size) if math.isfinite(grad) else math.inf
    return Outcome(status, error, float(out.info.error_estimate))
