"""The findings of `hg.check`, as numbers and as a table."""

from __future__ import annotations

from typing import NamedTuple

from hypergrad._solver import Info, Status


class Comparison(NamedTuple):
    """One directional derivative of the outer loss, per unit of relative change of the hyperparameters.

    Attributes:
        name: the direction: `"random 1"`, the path of an entry, or the path of a leaf.
        solver: product of the hypergradient with the direction.
        reference: the same derivative by finite differences of the problem solved again.
        reference_error: estimate of the absolute error of `reference`.
        relative_error: `|solver − reference| / |reference|` (dimensionless).
    """

    name: str
    solver: float
    reference: float
    reference_error: float
    relative_error: float


class Leaf(NamedTuple):
    """One leaf of the hyperparameters.

    Attributes:
        path: `"['l2']"`; empty where the hyperparameters are one array.
        size: number of entries.
        relative_error: relative error of the leaf's part of the hypergradient (dimensionless).
        entries: one comparison per entry, or random directions within a large leaf.
    """

    path: str
    size: int
    relative_error: float
    entries: tuple[Comparison, ...]


class Metasmoothness(NamedTuple):
    """How well a hypergradient of training agrees with the one after a step downhill.

    After Engstrom et al. 2025, arXiv:2503.13751: where they disagree, the loss over hyperparameters is too rough for
    gradients, and descent will not work even if the gradients are exact. Smoother training helps: warm-up, a lower
    learning rate, a larger `eps` in Adam, or a schedule without a sharp end.

    Attributes:
        cosine: cosine between the two, in relative coordinates, from −1 to 1.
        signs: agreement of the signs of their entries, weighted by size, from −1 to 1.
        step: length of the step, relative to the size of the hyperparameters (dimensionless).
    """

    cosine: float
    signs: float
    step: float


class Report(NamedTuple):
    """The findings of `hg.check`; print it to read them.

    Attributes:
        ok: whether the hypergradient is confirmed: its relative error is below `tol`, and the finite differences are
            accurate enough to show that.
        relative_error: `‖ĝ − g‖ / ‖g‖` over the directions tried (dimensionless), where ĝ is the result of the solver's
            first call and g the reference. Leaves count in units of their own size.
        reference_error: estimate of the relative error of the reference.
        settled_error: like `relative_error`, for the hypergradient after further calls at the same hyperparameters,
            when the outer loss no longer changes.
        one_call_error: like `relative_error`, against the derivative of what the *first* call computes. It differs from
            `relative_error` for solvers that continue training from call to call.
        error_estimate: the solver's own `info.error_estimate`.
        status: status of the first call; a plain integer for a code that is not in `hg.Status`.
        causes: findings that make, or would explain, a difference; each begins with a word. `off:` names the leaf or
            entry; `untrained:`, `saddle:`, `unused:`, `stale:`, `value:`, `shape:` and `contradicted:` are faults that
            no direction shows; `unconverged:`, `damped:`, `truncated:`, `stochastic:`, `kinked:`, `insensitive:`,
            `unreliable:` and others explain an error.
        directions: one row per direction.
        leaves: one row per leaf, with `per_leaf=True`.
        metasmoothness: see `Metasmoothness`, for unrolled runs; else None.
        key_spread: relative change of the hypergradient with other keys; NaN without a key.
        value: outer loss of the first call.
        tol: relative error allowed.
        precision: precision of the finite differences, `"float64"` or `"float32"`.
        info: `info` of the first call.
    """

    ok: bool
    relative_error: float
    reference_error: float
    settled_error: float
    one_call_error: float
    error_estimate: float
    status: Status | int
    causes: tuple[str, ...]
    directions: tuple[Comparison, ...]
    leaves: tuple[Leaf, ...]
    metasmoothness: Metasmoothness | None
    key_spread: float
    value: float
    tol: float
    precision: str
    info: Info

    def __str__(self) -> str:
        verdict = "confirmed" if self.ok else "NOT confirmed"
        sign = "<=" if self.relative_error <= self.tol else ">"
        lines = [
            f"hypergradient {verdict}: relative error {self.relative_error:.2g} {sign} {self.tol:.2g}",
            f"  status {getattr(self.status, 'name', self.status)}, error estimate {self.error_estimate:.2g}, "
            f"outer loss {self.value:.6g}",
            f"  finite differences in {self.precision}, good to {self.reference_error:.1g}",
            "",
            _row("direction", "hypergradient", "differences", "+-", "relative error"),
        ]
        lines += [_line(c) for c in self.directions]
        for leaf in self.leaves:
            lines += [
                "",
                f"  hparams{leaf.path} ({leaf.size} entr{'y' if leaf.size == 1 else 'ies'}): relative error "
                f"{leaf.relative_error:.2g}",
            ]
            lines += [_line(c) for c in leaf.entries]
        if self.metasmoothness is not None:
            m = self.metasmoothness
            lines += ["", f"  metasmoothness over a step of {m.step:.2g}: cosine {m.cosine:.3f}, signs {m.signs:.3f}"]
        if self.causes:
            lines += ["", "  what can be seen:"] + [f"  - {cause}" for cause in self.causes]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


def _row(name: str, *cells: str) -> str:
    return f"  {name:<18}" + "".join(f"{cell:>16}" for cell in cells)


def _line(c: Comparison) -> str:
    return _row(
        c.name[-18:], f"{c.solver:.6g}", f"{c.reference:.6g}", f"{c.reference_error:.1g}", f"{c.relative_error:.2g}"
    )
