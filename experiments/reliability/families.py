r"""P17 and P18: what `error_estimate` is worth, family by family.

    python experiments/reliability/families.py --only ridge --solver default --precision float32   # a row of the table
    python experiments/reliability/families.py --keep          # all rows that are missing, into families.jsonl
    python experiments/reliability/families.py --page          # the table on the page from families.jsonl

    error = ‖ĝ − g‖ / max(‖g‖, 10⁻³ (‖∂_λ f‖ + ‖(∂²_{λw} h) v‖)),    silent: usable, estimate < .05, error > .1

The truth is a dense float64 solution: Newton's method from where the solver ended, to rounding, then one solve with the
Hessian (the Jacobian, for a fixed point). A usable result at a saddle counts as wrong by any amount. Draws whose truth
is doubtful (condition number times rounding above .1, or a residual that Newton's method leaves) are left out.

All draws of a family (`problems.py`) run in one program, under `jax.vmap`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import hypergrad as hg  # noqa: E402
from experiments.reliability.problems import FAMILIES, SOLVERS, Family  # noqa: E402


class Row(NamedTuple):
    """One line of the table; `judged` are the draws whose truth is known."""

    family: str
    solver: str
    precision: str
    judged: int
    usable: int
    silent: int
    violations: int
    refused: int  # though right to 1e-6
    right: int
    over: float  # median of estimate / error among finite estimates above 1e-3, condition number × rounding < .01
    finite: int
    told: int | None = None  # over how many draws `over` is the median; None for rows from before it was counted


def _solver(family: Family, name: str) -> hg.Solver:
    if name == "gauss_newton":
        assert family.compose is not None
        return SOLVERS[name](hg.Problem(hg.compose(*family.compose), family.outer))
    problem = hg.Problem(family.inner, family.outer)
    if name == "fixed point":
        return hg.implicit(problem, inner=hg.inner.fixed_point(family.map))  # pyright: ignore
    return SOLVERS[name](problem)


def _truth(family: Family) -> Callable[..., Any]:
    """`(ŵ, h, train, valid) -> (g, floor, condition, residual, definite)` in float64."""
    if family.map is not None:
        residual = lambda w, h, b: w - family.map(w, h, b)  # pyright: ignore
    else:
        residual = jax.grad(family.inner)

    def solve(w: Any, h: Any, train: Any, valid: Any) -> Any:
        find = lambda w: residual(w, h, train)

        def newton(_: Any, w: Any) -> Any:
            matrix = jax.jacobian(find)(w)
            d = jnp.sqrt(jnp.abs(jnp.diag(matrix))) if family.map is None else jnp.ones_like(w)
            d = jnp.maximum(d, 1e-12 * jnp.max(d))
            u, s, vt = jnp.linalg.svd(matrix / d[:, None] / d[None])
            kept = s > 1e-14 * s[0]
            step = vt.T @ jnp.where(kept, (u.T @ (find(w) / d)) / jnp.where(kept, s, 1), 0) / d
            sizes = 0.5 ** jnp.arange(12.0)
            norms = jax.vmap(lambda t: jnp.linalg.norm(find(w - t * step)))(sizes)
            norms = jnp.where(jnp.isnan(norms), jnp.inf, norms)
            best = jnp.argmin(norms)
            return jnp.where(norms[best] < jnp.linalg.norm(find(w)), w - sizes[best] * step, w)

        def fall(_: Any, w: Any) -> Any:
            """A Newton step with the sizes of the eigenvalues, which does not end at a saddle beside the way."""
            values, vectors = jnp.linalg.eigh(jax.jacobian(find)(w))
            size = jnp.maximum(jnp.abs(values), 1e-14 * jnp.max(jnp.abs(values)))
            step = vectors @ ((vectors.T @ find(w)) / size)
            sizes = 0.5 ** jnp.arange(12.0)
            losses = jax.vmap(lambda t: family.inner(w - t * step, h, train))(sizes)
            best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))
            return jnp.where(losses[best] < family.inner(w, h, train), w - sizes[best] * step, w)

        found = jax.lax.fori_loop(0, 40, newton, w)
        if family.map is None:
            lower = jax.lax.fori_loop(0, 40, newton, jax.lax.fori_loop(0, 40, fall, w))
            found = jnp.where(jnp.linalg.eigvalsh(jax.hessian(family.inner)(found, h, train))[0] < 0, lower, found)
        w = found
        matrix = jax.jacobian(find)(w)
        # Features of other units are no condition number: the inverse of a scaled Hessian knows as many digits.
        d = jnp.sqrt(jnp.abs(jnp.diag(matrix))) if family.map is None else jnp.ones_like(w)
        d = jnp.maximum(d, 1e-12 * jnp.max(d))
        matrix = matrix / d[:, None] / d[None]
        u, s, vt = jnp.linalg.svd(matrix)
        kept = s > 1e-13 * s[0]
        rhs, direct = jax.grad(family.outer, argnums=(0, 1))(w, h, valid)
        v = u @ jnp.where(kept, (vt @ (rhs / d)) / jnp.where(kept, s, 1), 0) / d  # of the transpose
        flat = jnp.linalg.norm(jnp.where(kept, 0, vt @ (rhs / d))) / jnp.linalg.norm(rhs / d)
        pulled = jax.vjp(lambda h: residual(w, h, train), h)[1](v)[0]
        g = direct - pulled
        size = lambda x: jnp.linalg.norm(jnp.ravel(x))
        floor = jnp.maximum(size(g), 1e-3 * (size(direct) + size(pulled)))
        lowest = jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[0] / s[0]
        definite = (lowest > -1e-9) | (family.map is not None)
        smallest = jnp.min(jnp.where(kept, s, jnp.inf))
        scale = jnp.maximum(size(matrix @ (d * w)), size(matrix) * 1e-3 * size(d * w)) + 1e-30
        return g, floor, s[0] / smallest, size(find(w) / d) / scale, definite & (flat < 1e-7), w

    return jax.jit(jax.vmap(solve))


_CASTS = {
    "float64": (jnp.float64, jnp.float64, jnp.float64),
    "float32": (jnp.float32, jnp.float32, jnp.float32),
    "bfloat16 w": (jnp.bfloat16, jnp.float32, jnp.float32),
    "bfloat16 h": (jnp.float32, jnp.bfloat16, jnp.float32),
}


def sample(family: Family, name: str, solver: str, precision: str, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Errors, estimates, statuses, condition numbers and whether the truth is known, one a draw."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    instances = [family.draw(rng) for _ in range(draws)]
    start, h, train, valid = jax.tree.map(lambda *x: np.stack([np.asarray(y, np.float64) for y in x]), *instances)
    casts = _CASTS[precision]
    cast = lambda tree, dtype: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    start, h = cast(start, casts[0]), cast(h, casts[1])
    train, valid = cast((train, valid), casts[2])
    made = _solver(family, solver)

    def run(start: Any, h: Any, train: Any, valid: Any) -> Any:
        state = made.init(start, h)
        if family.warm:
            shifts = jnp.linspace(0.2, 0, family.warm, endpoint=False).astype(h.dtype)
            state = jax.lax.fori_loop(
                0, family.warm, lambda i, s: made.hypergrad(s, h + shifts[i], train, valid)[1], state
            )
        out, state = made.hypergrad(state, h, train, valid)
        return out.grad, out.info.error_estimate, out.info.status, state.params

    grad, estimate, status, params = jax.jit(jax.vmap(run))(start, h, train, valid)
    wide = lambda tree: cast(tree, jnp.float64)
    g, floor, condition, left, definite, exact = _truth(family)(
        jnp.nan_to_num(wide(params)), wide(h), wide(train), wide(valid)
    )
    flat = lambda x: np.asarray(x, np.float64).reshape(draws, -1)
    error = np.linalg.norm(flat(grad) - flat(g), axis=1) / np.asarray(floor)
    error = np.where(np.asarray(definite), error, np.inf)
    condition, left = np.asarray(condition), np.asarray(left)
    known = (condition * 2.2e-16 < 0.1) & (left < 1e-9) & np.isfinite(np.asarray(floor)) & (np.asarray(floor) > 0)
    return {
        "error": error,
        "estimate": np.asarray(estimate, np.float64),
        "status": np.asarray(status),
        "condition": condition,
        "known": known,
        "grad": flat(grad),
        "truth": flat(g),
        "params": np.asarray(params, np.float64),
        "exact": np.asarray(exact),
        "hparams": flat(h),
    }


def judge(name: str, solver: str, precision: str, found: dict[str, np.ndarray]) -> Row:
    known = found["known"]
    error, estimate, status, condition = (found[k][known] for k in ("error", "estimate", "status", "condition"))
    usable = status <= int(hg.Status.INSENSITIVE)
    eps = 2.2e-16 if precision == "float64" else 1.2e-7 if precision == "float32" else 7.8e-3
    silent = usable & (estimate < 0.05) & ~(error <= 0.1)
    violations = usable & ~(estimate >= 0.1 * error)
    right = error <= 1e-6
    useful = usable & np.isfinite(estimate) & (estimate > 1e-3) & (condition * eps < 0.01)
    over = float(np.median((estimate / np.maximum(error, 1e-300))[useful])) if useful.any() else np.nan
    count = lambda x: int(np.sum(x))
    return Row(
        name,
        solver,
        precision,
        judged=count(known),
        usable=count(usable),
        silent=count(silent),
        violations=count(violations),
        refused=count(right & ~usable),
        right=count(right),
        over=over,
        finite=count(usable & np.isfinite(estimate)),
        told=count(useful),
    )


def cases() -> Iterator[tuple[str, str, str]]:
    """Family, solver and precision of every row."""
    for name, family in FAMILIES.items():
        for solver in family.solvers:
            for precision in family.dtypes:
                yield name, solver, precision


def row(name: str, solver: str, precision: str, seed: int, draws: int) -> Row:
    return judge(name, solver, precision, sample(FAMILIES[name], name, solver, precision, draws, seed))


@functools.cache
def _in_small(seed: int) -> tuple[Row, ...]:
    """Three families by one solver each, with eight draws."""
    return tuple(row(name, FAMILIES[name].solvers[0], "float32", seed, 8) for name in ("Poisson", "saddle", "slow map"))


def line(row: Row) -> str:
    """A row of the table in Markdown."""
    over = "-" if np.isnan(row.over) else f"{row.over:.2g}" + (f" of {row.told}" if row.told is not None else "")
    cells = (row.family, row.solver, row.precision, row.judged, row.usable, row.finite, row.silent, row.violations)
    return "| " + " | ".join(map(str, (*cells, f"{row.refused} of {row.right}", over))) + " |"


HEAD = (
    "| family | solver | precision | draws | usable | finite estimate | silent | below a tenth | right, refused | "
    "median over-estimate |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def p17(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """An estimate is at least a tenth of the error, or infinite; nothing is silent."""
    return _promise(honest, seed, smoke)


def p18(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """What is right to 1e-6 is not refused."""
    return _promise(fair, seed, smoke)


def _promise(
    judged: Callable[[tuple[Row, ...]], tuple[str, str, bool]], seed: int, smoke: bool
) -> tuple[str, str, bool]:
    """What the kept table says of a promise; a smoke run measures a few rows in place of it."""
    if smoke:
        return judged(_in_small(seed))
    found, every = tuple(kept().values()), sum(1 for _ in cases())
    figure, bar, met = judged(found)
    return f"{len(found)} of {every} rows, seed {SEED}: {figure}", bar, met and len(found) == every


def honest(found: tuple[Row, ...]) -> tuple[str, str, bool]:
    """What a table says of P17."""
    draws, silent = sum(r.judged for r in found), sum(r.silent for r in found)
    below = sum(r.violations for r in found)
    worst = max(found, key=lambda r: r.violations / max(r.judged, 1))
    over = [r.over for r in found if not np.isnan(r.over)]
    most = f"; most in {worst.family} ({worst.solver}, {worst.precision}): {worst.violations} of {worst.judged}"
    figure = (
        f"{silent} silent and {below} below a tenth of {draws}{most if below else ''}; over-estimate: median of "
        f"medians {np.median(over) if over else np.nan:.1f}, {sum(o > 30 for o in over)} of {len(over)} above 30"
    )
    met = silent == 0 and all(r.violations <= r.judged / 1000 for r in found) and all(o <= 30 for o in over)
    return figure, "0 silent; <= 1 in 1000 of each below; over-estimate <= 30", bool(met)


def fair(found: tuple[Row, ...]) -> tuple[str, str, bool]:
    """What a table says of P18."""
    refused, right = sum(r.refused for r in found), sum(r.right for r in found)
    draws = sum(r.judged for r in found)
    return f"{refused} of {right} right, of {draws} draws", "<= 2 % of the draws", refused <= 0.02 * draws


# The table on the page ------------------------------------------------------------------------------------------------

DRAWS, SEED = 200, 5
KEPT, PAGE = (Path(__file__).with_name(name) for name in ("families.jsonl", "README.md"))


def kept() -> dict[tuple[str, str, str], Row]:
    """The rows of `families.jsonl`, in the order of `FAMILIES`; a later line takes the place of an earlier one."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    known = {(r.family, r.solver, r.precision): r for r in (Row(**json.loads(text)) for text in lines)}
    return {case: known[case] for case in cases() if case in known}


def write_page() -> None:
    """The table, and what it says of both promises, between the marks on the page."""
    rows = kept()
    found, left = tuple(rows.values()), [case for case in cases() if case not in rows]
    names = sorted({case[0] for case in left})
    missing = f"; {len(left)} rows are not measured yet: {', '.join(names)}" if left else ""
    text = [
        f"{len(found)} of {len(found) + len(left)} rows, {sum(r.judged for r in found)} draws{missing}.",
        f"P17: {honest(found)[0]}. P18: {fair(found)[0]}.",
        "",
        *HEAD,
        *map(line, found),
    ]
    head, rest = PAGE.read_text().split("<!-- families -->\n")
    PAGE.write_text(
        f"{head}<!-- families -->\n" + "\n".join(text) + "\n<!-- /families -->" + rest.split("<!-- /families -->")[1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(FAMILIES), help="a family (again for more)")
    parser.add_argument("--solver")
    parser.add_argument("--precision")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--keep", action="store_true", help="append the rows that families.jsonl lacks to it")
    parser.add_argument("--page", action="store_true", help="write the table on the page, and measure nothing")
    options = parser.parse_args()
    known = kept() if options.keep else {}
    print(*HEAD, sep="\n")
    for case in cases():
        name, solver, precision = case
        chosen = (not options.only or name in options.only) and options.solver in (None, solver)
        if options.page or not chosen or options.precision not in (None, precision) or case in known:
            continue
        found = row(*case, options.seed, options.draws)
        print(line(found), flush=True)
        if options.keep:
            with KEPT.open("a") as file:
                file.write(json.dumps(found._asdict()) + "\n")
    if options.page or options.keep:
        write_page()


if __name__ == "__main__":
    main()
