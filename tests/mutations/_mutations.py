"""Bugs of the kind that hypergradients have, one source edit each."""

from __future__ import annotations

from typing import NamedTuple

FORMS = "tests/solvers/test_implicit.py"
STATUSES = "tests/solvers/test_statuses.py"
UNROLLED = "tests/solvers/test_unrolled.py"
TUNE = "tests/outer/test_tune.py"
AGREEMENT = "tests/solvers/test_agreement.py"
LINEAR = "tests/linear/test_linear.py"
SINGLE = "tests/solvers/test_single_loop.py"


class Mutation(NamedTuple):
    """One bug.

    Attributes:
        what: in words.
        file: inside `hypergrad/`.
        old, new: the edit; `old` occurs exactly once in the file.
        tests: files that ought to notice, the likeliest first.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "implicit: direct term dropped", "solvers/implicit.py", "lambda d, c: d - c.", "lambda d, c: -c.", (FORMS,)
    ),
    Mutation(
        "implicit: sign of the indirect term",
        "solvers/implicit.py",
        "lambda d, c: d - c.",
        "lambda d, c: d + c.",
        (FORMS,),
    ),
    Mutation(
        "implicit: state keeps the stale parameters",
        "solvers/_call.py",
        "        params=optimum.params,\n",
        "        params=state.params,\n",
        (FORMS,),
    ),
    Mutation(
        "implicit: damping forgotten in the operator",
        "solvers/implicit.py",
        "return system, damped(system.matvec, shift), shift",
        "return system, system.matvec, shift",
        (AGREEMENT,),
    ),
    Mutation(
        "implicit: insensitivity never reported",
        "solvers/_call.py",
        "zero = _tree.max_abs(grad) == 0",
        "zero = _tree.max_abs(grad) < 0",
        (STATUSES,),
    ),
    Mutation(
        "implicit: error estimate a hundred times too small",
        "solvers/_error.py",
        "_SAFETY = 4.0",
        "_SAFETY = 0.04",
        ("tests/solvers/test_error_estimate.py",),
    ),
    Mutation(
        "implicit: inner and outer loss share a key",
        "solvers/_call.py",
        "inner_key, outer_key, *keys = (None,) * count if key is None else jax.random.split(key, count)",
        "inner_key, outer_key, *keys = (key,) * count",
        (AGREEMENT, FORMS),
    ),
    Mutation(
        "status: the latest cause wins", "_solver.py", "for code in reversed(codes):", "for code in codes:", (STATUSES,)
    ),
    Mutation(
        "cross product: of a map, transposed operator",
        "_curvature.py",
        "return System(value, lambda v: pull(v)[0],",
        "return System(value, lambda v: jax.jvp(lambda w: residual(w, hparams), (params,), (v,))[1],",
        ("tests/inner/test_fixed_point.py", FORMS),
    ),
    Mutation(
        "cross product: twice as large",
        "_curvature.py",
        "return jax.jvp(lambda w: jax.grad(loss, argnums=(0, 1))(w, hparams), (params,), (v,))[1]",
        "hv, cross = jax.jvp(lambda w: jax.grad(loss, argnums=(0, 1))(w, hparams), (params,), (v,))[1]\n"
        "    return hv, jax.tree.map(lambda x: 2 * x, cross)",
        (FORMS,),
    ),
    Mutation(
        "Gauss-Newton: curvature of the loss dropped",
        "_curvature.py",
        "pull(curve(push(v)))",
        "pull(push(v))",
        (AGREEMENT,),
    ),
    Mutation(
        "damping: sign",
        "_curvature.py",
        "_tree.axpy(damping, v, matvec(v))",
        "_tree.axpy(-damping, v, matvec(v))",
        (AGREEMENT,),
    ),
    Mutation(
        "linear: right-hand side not normalised",
        "linear/_linear.py",
        "        _unit(rhs, size),\n        start=start",
        "        rhs,\n        start=start",
        (LINEAR,),
    ),
    Mutation(
        "linear: norm not put back",
        "linear/_linear.py",
        "_tree.scale(jnp.where(zero, 1, size), result.solution)",
        "result.solution",
        (LINEAR,),
    ),
    Mutation(
        "linear: warm start, sign of its residual",
        "linear/_linear.py",
        "return x, _tree.axpy(-length, unit, rhs)",
        "return x, _tree.axpy(length, unit, rhs)",
        (LINEAR,),
    ),
    Mutation(
        "CG: steepest descent (no conjugacy)",
        "linear/cg.py",
        "beta = _tree.safe_divide(rz, c.rz, where=ok)",
        "beta = 0 * rz",
        ("tests/linear/test_cg.py",),
    ),
    Mutation(
        "CG: stale iterate returned",
        "linear/cg.py",
        "_tree.where(ok, x, c.x),",
        "c.x,",
        ("tests/linear/test_cg.py", LINEAR),
    ),
    Mutation(
        "L-BFGS: faint decreases judged by values",
        "inner/lbfgs.py",
        "room = jnp.where(-step * c.slope <= doubtful, doubtful, _NOISE * noise)",
        "room = _NOISE * noise",
        ("tests/inner/test_lbfgs.py",),
    ),
    Mutation(
        "Newton: faint decreases judged by values",
        "inner/newton.py",
        "noise = jnp.where(slope <= eps**0.75 * size, eps**0.75, 16 * eps) * size",
        "noise = 16 * eps * size",
        ("tests/inner/test_newton.py",),
    ),
    Mutation(
        "check: a hypergradient left behind is not looked for",
        "diagnostics/_probes.py",
        "or distance > max(_STALE, 10 * tol) * size or left_behind)",
        "or distance > max(_STALE, 10 * tol) * size)",
        ("tests/diagnostics/test_check.py",),
    ),
    Mutation(
        "implicit: conjugate gradients are not told how well A is known",
        "solvers/implicit.py",
        ', "noise": hidden_curvature(optimum)}',
        "}",
        ("tests/solvers/test_error_estimate.py",),
    ),
    Mutation(
        "CG: negative curvature not looked for",
        "linear/cg.py",
        "ok = (rayleigh > known * high) & (c.rz > 0)",
        "ok = c.rz > 0",
        ("tests/linear/test_cg.py", STATUSES),
    ),
    Mutation(
        "Neumann: step size missing from the sum",
        "linear/neumann.py",
        "_tree.axpy(step_size, c.total, x)",
        "_tree.axpy(1.0, c.total, x)",
        ("tests/linear/test_neumann.py",),
    ),
    Mutation(
        "Neumann: sign of a term",
        "linear/neumann.py",
        "term = _tree.sub(c.term, product)",
        "term = _tree.add(c.term, product)",
        ("tests/linear/test_neumann.py",),
    ),
    Mutation(
        "Neumann: one term too few",
        "linear/neumann.py",
        '    max_steps = options["max_steps"]\n',
        '    max_steps = options["max_steps"] - 1\n',
        ("tests/linear/test_neumann.py",),
    ),
    Mutation(
        "T1-T2: step size missing",
        "linear/identity.py",
        '_tree.scale(options["step_size"], rhs)',
        "_tree.scale(1.0, rhs)",
        ("tests/linear/test_identity.py",),
    ),
    Mutation(
        "Nyström: sign in Woodbury's identity",
        "linear/nystrom.py",
        "return _tree.scale(1 / rho, _tree.sub(v, weigh(factor, inner)))",
        "return _tree.scale(1 / rho, _tree.add(v, weigh(factor, inner)))",
        ("tests/linear/test_nystrom.py",),
    ),
    Mutation(
        "dense: transposed matrix",
        "linear/dense.py",
        "jnp.where(finite, columns.T,",
        "jnp.where(finite, columns,",
        ("tests/linear/test_dense.py",),
    ),
    Mutation(
        "GMRES: sign of a rotation",
        "linear/gmres.py",
        ".set(cos * upper + sin * lower)",
        ".set(cos * upper - sin * lower)",
        ("tests/linear/test_gmres.py",),
    ),
    Mutation(
        "unrolled: direct term dropped",
        "solvers/unrolled.py",
        "lambda d, i: d + i.astype(d.dtype)",
        "lambda d, i: i.astype(d.dtype)",
        (UNROLLED,),
    ),
    Mutation(
        "unrolled: truncation off by one",
        "solvers/unrolled.py",
        "steps if truncate is None else int(truncate)",
        "steps if truncate is None else min(int(truncate) + 1, steps)",
        (UNROLLED,),
    ),
    Mutation(
        "unrolled: dependence of the initial state dropped",
        "solvers/unrolled.py",
        "floats = None if skip or warm_start else",
        "floats = None if True else",
        (UNROLLED, "tests/inner/test_gradient.py"),
    ),
    Mutation(
        "unrolled: adjoint not scaled back",
        "solvers/unrolled.py",
        "return _Pass(point, record, value, metrics, direct, rhs, _tree.scale(size, total),",
        "return _Pass(point, record, value, metrics, direct, rhs, total,",
        (UNROLLED,),
    ),
    Mutation(
        "unrolled: explosion never reported",
        "unrolling/error.py",
        "_MEANINGLESS = 0.1",
        "_MEANINGLESS = 1e30",
        (UNROLLED,),
    ),
    Mutation(
        "unrolled: twins on one side believed",
        "unrolling/error.py",
        "bent = (spread.bend > ",
        "bent = (spread.bend < -",
        ("tests/unrolling/test_error.py",),
    ),
    Mutation(
        "unrolled: signs that rounding could turn kept",
        "unrolling/step.py",
        "update = doubted(update, ",
        "update = doubted(update, 0 * ",
        ("tests/unrolling/test_error.py",),
    ),
    Mutation(
        "step: cross term dropped", "unrolling/step.py", "_tree.add(contribution, cross)", "contribution", (UNROLLED,)
    ),
    Mutation(
        "step: identity part of the pullback dropped",
        "unrolling/step.py",
        "_tree.add(kept, curved)",
        "curved",
        (UNROLLED,),
    ),
    Mutation(
        "sweep: steps in the wrong order",
        "unrolling/reverse.py",
        "body(count - 1 - (j * width + i), b)",
        "body(j * width + i, b)",
        (UNROLLED,),
    ),
    Mutation(
        "sweep: time of a step always that of the first",
        "unrolling/reverse.py",
        "return _pull(step, here, at, last, back)",
        "return _pull(step, here, begin, last, back)",
        (UNROLLED, AGREEMENT),
    ),
    Mutation(
        "forward: time of a step off by one",
        "unrolling/forward.py",
        "one(carry.point, carry.tangent, begin + i)",
        "one(carry.point, carry.tangent, begin + i + 1)",
        (UNROLLED,),
    ),
    Mutation(
        "keys: the same batch at every step",
        "_problem.py",
        "jax.random.fold_in(step_key, step)",
        "step_key",
        ("tests/test_data.py", UNROLLED, "tests/inner/test_gradient.py"),
    ),
    Mutation(
        "keys: every outer step draws the same", "outer/_step.py", "jax.random.fold_in(key, loop.step)", "key", (TUNE,)
    ),
    Mutation(
        "minibatches: the last row is never drawn",
        "_data.py",
        "jax.random.randint(key, (data.size,), 0, n, jnp.int32)",
        "jax.random.randint(key, (data.size,), 0, n - 1, jnp.int32)",
        ("tests/test_data.py",),
    ),
    Mutation(
        "tune: a failed step is taken",
        "outer/_step.py",
        "_tree.where(ok, (free, outer_state), (loop.trial, loop.outer))",
        "(free, outer_state)",
        (TUNE,),
    ),
    Mutation(
        "tune: the worst step is the best",
        "outer/_step.py",
        "~(value >= loop.best.value)",
        "~(value <= loop.best.value)",
        (TUNE,),
    ),
    Mutation(
        "tune: derivative of the domain forgotten",
        "outer/_step.py",
        "(grad,) = pull(jax.tree.map(lambda g, h: jnp.asarray(g).astype(h.dtype), out.grad, hparams))",
        "grad = jax.tree.map(lambda g, h: jnp.asarray(g).astype(h.dtype), out.grad, hparams)",
        (TUNE,),
    ),
    Mutation(
        "optimum: linearized before polishing",
        "inner/_optimum.py",
        "linearize(inner, objective, c.params, hparams)",
        "linearize(inner, objective, params, hparams)",
        (FORMS, AGREEMENT),
    ),
    Mutation(
        "optimum: residual not relative",
        "inner/_optimum.py",
        "residual = c.norm / jnp.where(size > 0, size, 1)",
        "residual = c.norm",
        (FORMS, STATUSES),
    ),
    Mutation(
        "polish: keeps what is worse",
        "inner/newton.py",
        "better = after < before\n",
        "better = after > before\n",
        (FORMS,),
    ),
    Mutation(
        "best response: no NaN after a failure",
        "solvers/best_response.py",
        "factor = jnp.where(good, 1.0, jnp.nan)",
        "factor = jnp.where(good, 1.0, 1.0)",
        ("tests/solvers/test_best_response.py", STATUSES),
    ),
    Mutation(
        "single loop: SABA without the mean of its table",
        "solvers/_directions.py",
        "directions(_tree.add(_tree.sub(new, old), memory.mean))",
        "directions(_tree.sub(new, old))",
        (SINGLE,),
    ),
    Mutation(
        "single loop: the last block weighs as much as a whole one",
        "solvers/_directions.py",
        "_tree.scale(length * self.count / self.rows, found)",
        "_tree.scale(1.0, found)",
        (SINGLE,),
    ),
    Mutation(
        "single loop: AmIGO starts each adjoint from zero",
        "solvers/_directions.py",
        "lax.fori_loop(steps, 2 * steps, solve, adjoint)",
        "lax.fori_loop(steps, 2 * steps, solve, _tree.zeros_like(adjoint))",
        (SINGLE,),
    ),
    Mutation(
        "single loop: SRBA compares a point with itself",
        "solvers/_directions.py",
        "oracles.terms(0, memory.before, model_state)",
        "oracles.terms(0, point, model_state)",
        (SINGLE,),
    ),
    Mutation(
        "single loop: F2SA adds the outer loss on both sides",
        "solvers/_directions.py",
        "_tree.axpy(sign * epsilon, tuple(outer), inner)",
        "_tree.axpy(epsilon, tuple(outer), inner)",
        (SINGLE,),
    ),
    Mutation(
        "arithmetic: half-precision accumulation",
        "_tree.py",
        "return x.astype(jnp.promote_types(x.dtype, jnp.float32))",
        "return x",
        ("tests/test_tree.py",),
    ),
)
