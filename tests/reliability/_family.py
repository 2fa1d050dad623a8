"""One family of problems in which most faults are values, so that one compiled program per solver meets them all.

    h = ½ wᵀAw − λ bᵀw + ¼ q Σ w⁴ + Σ κ |w| + ½ η Σ max(w, 0)² + τ √(Σ w² + 1 − τ) + (NaN where w₀ > wall)
    f = s (cᵀw + ½ d λ²)

and its hypergradient in NumPy, in float64: at the optimum, or along the steps that training takes.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg

RATE, STEPS, CUT = 0.2, 100, 20  # of the solvers that take steps; CUT of them are differentiated by the truncated one
HPARAM = 0.37
ROOT = np.array([[1.0, 0.3, -0.2], [0.0, 1.2, 0.4], [0.5, 0.0, 0.9]])
GOOD = ROOT @ ROOT.T
TURN = np.linalg.qr(ROOT)[0]
FLAT = TURN @ np.diag([1.0, 2.0, 0.0]) @ TURN.T


class Member(NamedTuple):
    """One problem of the family: its data, where it starts, and the traced options of the solver.

    Attributes:
        inner, linear: options to replace, where the solver has them.
        solved: whether to start at the solution of the quadratic.
    """

    a: Any = GOOD
    b: Any = (0.7, -0.4, 1.1)
    c: Any = (0.3, 0.9, -0.5)
    quartic: float = 0.0
    kink: float = 0.0
    hinge: float = 0.0
    trap: float = 0.0
    wall: float = math.inf
    size: float = 1.0
    direct: float = 0.3
    start: Any = (0.0, 0.0, 0.0)
    solved: bool = False
    inner: dict[str, float] = {}
    linear: dict[str, float] = {}

    def data(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """`train`, `valid`."""
        names = ("a", "b", "quartic", "kink", "hinge", "trap", "wall"), ("c", "size", "direct")
        train, valid = ({n: jnp.asarray(np.asarray(getattr(self, n), np.float64)) for n in part} for part in names)
        return train, valid

    def begin(self) -> np.ndarray:
        """Parameters at the start."""
        if self.solved:
            return np.linalg.lstsq(np.asarray(self.a), HPARAM * np.asarray(self.b), rcond=None)[0]
        return np.asarray(self.start, np.float64)


def inner_loss(w, h, batch):
    quadratic = 0.5 * w @ batch["a"] @ w - h * batch["b"] @ w + 0.25 * batch["quartic"] * jnp.sum(w**4)
    bent = batch["kink"] * jnp.sum(jnp.abs(w)) + 0.5 * batch["hinge"] * jnp.sum(jnp.maximum(w, 0.0) ** 2)
    root = batch["trap"] * jnp.sqrt(jnp.sum(w**2) + 1.0 - batch["trap"])
    return quadratic + bent + root + jnp.where(w[0] > batch["wall"], jnp.nan, 0.0)


def outer_loss(w, h, batch):
    return batch["size"] * (batch["c"] @ w + 0.5 * batch["direct"] * h**2)


PROBLEM = hg.Problem(inner_loss, outer_loss)


def proximal_step(w, h, batch):
    """The same by proximal gradient steps, which are exact at the kink."""
    smooth = lambda w: inner_loss(w, h, batch | {"kink": 0.0})
    z = w - RATE * jax.grad(smooth)(w)
    z = jnp.sign(z) * jnp.maximum(jnp.abs(z) - RATE * batch["kink"], 0.0)
    return jnp.where(z[0] > batch["wall"], jnp.nan, z)


def arguments(solver: hg.Solver, member: Member) -> tuple[Any, ...]:
    """`(state, hparams, train, valid)` with the member's options in the types that `init` gave them."""
    h = jnp.asarray(HPARAM)
    state = solver.init(jnp.asarray(member.begin()), h)
    for name in ("inner", "linear"):
        for option, value in getattr(member, name).items():
            if option in (known := getattr(state, "options", {}).get(name, {})):
                known[option] = jnp.asarray(value, known[option].dtype)
    return (state, h, *member.data())


def stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def truth(member: Member, kind: str) -> float:
    """The exact hypergradient in float64: of the optimum, of a learned response, of the path, or of what the outer loss
    sees directly.

    Infinite where there is none, so that every number is wrong; NaN on a kink, where every number between the two
    one-sided derivatives is as good as another.
    """
    with np.errstate(all="ignore"):
        m = member._replace(**{n: np.asarray(getattr(member, n), np.float64) for n in ("a", "b", "c")})
        direct = m.size * m.direct * HPARAM
        if kind == "direct":
            return direct
        if kind == "response" and _quadratic(m) and np.linalg.matrix_rank(m.a) < len(m.a):
            # Of the many optima, training from zero ends in the shortest, and that has a derivative.
            return direct + m.size * float(m.b @ np.linalg.pinv(m.a, rcond=1e-12) @ m.c)
        if kind == "path":
            through = _path(m)
            return direct + m.size * through if math.isfinite(through) else math.inf
        return direct + m.size * (_lasso(m) if m.kink else _optimum(m))


def _slope(m: Member, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """∂_w h and ∂²_ww h."""
    root = math.sqrt(w @ w + 1 - m.trap) if w @ w + 1 - m.trap > 0 else math.nan
    grad = m.a @ w - HPARAM * m.b + m.quartic * w**3 + m.kink * np.sign(w) + m.hinge * np.maximum(w, 0)
    hess = m.a + np.diag(3 * m.quartic * w**2 + m.hinge * (w > 0))
    if m.trap:
        grad, hess = grad + m.trap * w / root, hess + m.trap * (np.eye(3) / root - np.outer(w, w) / root**3)
    return (grad, hess) if w[0] <= m.wall else (grad * math.nan, hess * math.nan)


def _path(m: Member) -> float:
    w, z = m.begin(), np.zeros(3)
    for _ in range(STEPS):
        grad, hess = _slope(m, w)
        w, z = w - RATE * grad, z - RATE * (hess @ z - m.b)
    return float(m.c @ z)


def _optimum(m: Member) -> float:
    # Beyond what float64 could tell of itself, and not singular.
    if _quadratic(m) and 1e8 < np.linalg.cond(m.a) < 1e13:
        return _exact(m)
    w = m.begin()
    for _ in range(100):
        grad, hess = _slope(m, w)
        if not np.all(np.isfinite(hess)):
            return math.inf
        step, shrink = np.linalg.lstsq(hess, grad, rcond=1e-12)[0], 1.0
        while shrink > 1e-3 and not np.linalg.norm(_slope(m, w - shrink * step)[0]) < np.linalg.norm(grad):
            shrink /= 2
        if shrink <= 1e-3:
            break
        w = w - shrink * step
    grad, hess = _slope(m, w)
    adjoint = np.linalg.lstsq(hess, m.c, rcond=1e-12)[0]
    solved = np.linalg.norm(grad) <= 1e-8 * max(1, np.linalg.norm(m.b)) and np.allclose(hess @ adjoint, m.c, atol=1e-8)
    return float(m.b @ adjoint) if solved else math.inf


def _quadratic(m: Member) -> bool:
    """Whether the inner loss is ½ wᵀAw − λ bᵀw, of finite numbers."""
    return not (m.quartic or m.kink or m.hinge or m.trap) and m.wall == math.inf and bool(np.isfinite(m.a).all())


def _exact(m: Member) -> float:
    """bᵀ A⁻¹ c in rational arithmetic, by Cramer's rule."""
    rows = [[Fraction(float(x)) for x in row] for row in m.a]

    def det(r: list[list[Fraction]]) -> Fraction:
        (a, b, c), (d, e, f), (g, h, i) = r
        return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)

    replaced = lambda j: [[Fraction(float(m.c[i])) if k == j else x for k, x in enumerate(rows[i])] for i in range(3)]
    return float(sum(Fraction(float(m.b[j])) * det(replaced(j)) for j in range(3)) / det(rows))


def _lasso(m: Member) -> float:
    """Where coordinates are zero they stay so, unless they are just about to leave: then there is no one derivative."""
    w = m.begin()
    for _ in range(3000):
        z = w - 0.1 * (m.a @ w - HPARAM * m.b + m.quartic * w**3)
        w = np.sign(z) * np.maximum(np.abs(z) - 0.1 * m.kink, 0)
    on = w != 0
    slack = np.abs(m.a @ w - HPARAM * m.b)[~on] - m.kink
    if np.any(np.abs(slack) < 1e-9):
        return math.nan
    hess = (m.a + np.diag(3 * m.quartic * w**2))[np.ix_(on, on)]
    return float(m.b[on] @ np.linalg.solve(hess, m.c[on])) if on.any() else 0.0
