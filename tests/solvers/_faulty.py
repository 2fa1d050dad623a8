"""A family of problems in which what is wrong is in the data and in the traced options, so that one program serves most
faults:

    h = ½ wᵀAw − λ bᵀw + κ ‖w‖₁ + ¼ q Σ w⁴,     f = cᵀw
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from hypergrad import Status


def inner_loss(w, h, batch):
    a, b, kink, quartic = batch["a"], batch["b"], batch["kink"], batch["quartic"]
    return 0.5 * w @ a @ w - h * b @ w + kink * jnp.sum(jnp.abs(w)) + 0.25 * quartic * jnp.sum(w**4)


def outer_loss(w, h, batch):
    return batch["c"] @ w


PROBLEM = hg.Problem(inner_loss, outer_loss)
SOLVER = hg.implicit(PROBLEM)
ROOT = np.array([[1.0, 0.3, -0.2], [0.0, 1.2, 0.4], [0.5, 0.0, 0.9]])
GOOD = ROOT @ ROOT.T
NAN = float("nan")


class Member(NamedTuple):
    """One problem of the family, and what its hypergradient's status must be."""

    expected: Status = Status.OK
    a: Any = GOOD
    b: Any = (0.7, -0.4, 1.1)
    c: Any = (0.3, 0.9, -0.5)
    kink: float = 0.0
    quartic: float = 0.0
    inner: dict[str, float] = {}
    linear: dict[str, float] = {}

    def data(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """`train`, `valid`."""
        train = {"a": self.a, "b": self.b, "kink": self.kink, "quartic": self.quartic}
        return jax.tree.map(_array, train, is_leaf=_is_data), {"c": _array(self.c)}


def _array(x: Any) -> jax.Array:
    return jnp.asarray(np.asarray(x, np.float64))


def _is_data(x: Any) -> bool:
    return isinstance(x, (tuple, np.ndarray, float))


TURN = np.linalg.qr(ROOT)[0]
FLAT = TURN @ np.diag([1.0, 2.0, 0.0]) @ TURN.T
FAULTS: dict[str, Member] = {
    "inner steps": Member(Status.INNER_MAX_STEPS, quartic=50.0, b=(7.0, -4.0, 11.0), inner={"max_steps": 1}),
    "linear steps": Member(Status.LINEAR_MAX_STEPS, linear={"max_steps": 1}),
    "inner tolerance below rounding": Member(Status.PRECISION_LIMITED, quartic=3.0, inner={"tol": 1e-30}),
    "linear tolerance below rounding": Member(Status.PRECISION_LIMITED, linear={"tol": 1e-30}),
    "inner loss is NaN": Member(Status.NONFINITE_LOSS, b=(NAN, 0.0, 1.0)),
    "outer loss is NaN": Member(Status.NONFINITE_LOSS, c=(NAN, 0.0, 1.0)),
    "outer loss is infinite": Member(Status.NONFINITE_LOSS, c=(float("inf"), 0.0, 1.0)),
    "saddle": Member(Status.NEG_CURVATURE, a=np.diag([1.0, -1.0, 2.0]), b=(0.0, 0.0, 0.0)),
    "no curvature along the right-hand side": Member(
        Status.NEG_CURVATURE, a=np.array([[0, 1.0, 0], [1.0, 0, 0], [0, 0, 1.0]]), b=(0.0, 0.0, 0.0), c=(1.0, 0.0, 0.0)
    ),
    "singular, no solution": Member(Status.SINGULAR, a=FLAT, b=FLAT @ [1.0, 1.0, 0.0], c=(1.0, 1.0, 1.0)),
    "singular, a solution": Member(Status.OK, a=FLAT, b=FLAT @ [1.0, 1.0, 0.0], c=FLAT @ [0.2, 1.0, 0.7]),
    "a parameter that the inner loss ignores": Member(
        Status.SINGULAR, a=np.diag([1.0, 2.0, 0.0]), b=(1.0, 1.0, 0.0), c=(1.0, 1.0, 1.0)
    ),
    "a parameter that no loss uses": Member(
        Status.OK, a=np.diag([1.0, 2.0, 0.0]), b=(1.0, 1.0, 0.0), c=(1.0, 1.0, 0.0)
    ),
    "outer gradient is zero": Member(Status.OK, c=(0.0, 0.0, 0.0)),
    "the hyperparameter moves nothing here": Member(Status.INSENSITIVE, b=(0.0, 0.0, 0.0)),
    "kink": Member(Status.INNER_STALLED, kink=5.0),
}


def start(solver: hg.Solver, member: Member, h: jax.Array) -> Any:
    """State with the member's options, in the types that `init` gave them."""
    state = solver.init(jnp.zeros(3), h)
    for name in ("inner", "linear"):
        for option, value in getattr(member, name).items():
            state.options[name][option] = jnp.asarray(value, state.options[name][option].dtype)
    return state


def stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def batch(solver: hg.Solver, members: list[Member]) -> tuple[Any, ...]:
    hparams = jnp.asarray([0.37 + 0.01 * i for i in range(len(members))])
    states = stack([start(solver, m, h) for m, h in zip(members, hparams, strict=True)])
    data = [m.data() for m in members]
    return states, hparams, stack([d[0] for d in data]), stack([d[1] for d in data])


def pick(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], tree)
