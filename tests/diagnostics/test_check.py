"""`hg.check` confirms what is right, refuses what is wrong by as much as it is wrong, and names the causes it sees."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad._solver import Hypergradient, Solver, Status
from hypergrad.diagnostics.check import check
from tests._helpers import flat, tol
from tests.diagnostics import _ridge as ridge

TRAIN, VALID = ridge.data(), ridge.data(seed=1)
H = ridge.hparams()
W = jnp.zeros(4)


def run(solver, hparams=H, **options):
    return check(solver, W, hparams, TRAIN, VALID, **options)


def words(report):
    return {cause.split(":")[0] for cause in report.causes}


def true_gradients():
    """The hypergradient and its direct part."""
    w = ridge.best_response(H, TRAIN)
    return jax.grad(ridge.outer_of)(H, TRAIN, VALID), jax.grad(ridge.outer_loss, argnums=1)(w, H, VALID)


def scaled_norm(tree):
    """Each leaf in units of its own size."""
    return np.sqrt(
        sum(
            np.mean(flat(h) ** 2) * np.sum(flat(g) ** 2)
            for h, g in zip(jax.tree.leaves(H), jax.tree.leaves(tree), strict=True)
        )
    )


def scale(tree, factor):
    return jax.tree.map(lambda x: factor * x, tree)


def subtract(a, b):
    return jax.tree.map(jnp.subtract, a, b)


@pytest.mark.parametrize("directions", [3, 5])
def test_a_right_hypergradient_is_confirmed(directions):
    report = run(ridge.solver(), directions=directions)
    assert report.ok and not report.causes
    assert report.relative_error < tol(1e-7, 1e-4)
    assert report.reference_error < 1e-6
    assert len(report.directions) == directions
    assert report.directions[0].name == ("random 1" if directions < 5 else "['l2'][0]")


@pytest.mark.parametrize(
    ("name", "change", "error", "cause"),
    [
        ("sign", lambda total, direct: scale(total, -1.0), 2.0, "-1 times"),
        ("factor", lambda total, direct: scale(total, 1.1), 0.1, "1.1 times"),
        ("zero", lambda total, direct: scale(total, 0.0), 1.0, "insensitive"),
        (
            "no direct term",
            lambda total, direct: subtract(total, direct),
            None,
            "['shift'] has a hypergradient of exactly",
        ),
        ("direct term twice", lambda total, direct: jax.tree.map(jnp.add, total, direct), None, "wrong"),
        ("only the direct term", lambda total, direct: direct, None, "wrong"),
        ("reversed", lambda total, direct: {**total, "l2": total["l2"][::-1]}, None, "wrong"),
    ],
)
def test_a_wrong_hypergradient_is_refused_by_as_much_as_it_is_wrong(name, change, error, cause):
    total, direct = true_gradients()
    if error is None:
        error = scaled_norm(subtract(change(total, direct), total)) / scaled_norm(total)
    report = run(ridge.solver(change), directions=5)  # five entries: every one of them
    assert not report.ok
    assert report.relative_error == pytest.approx(error, rel=1e-3)
    assert any(cause in text for text in report.causes)
    few = run(ridge.solver(change), directions=3)
    assert not few.ok and 0.2 * error < few.relative_error < 5 * error


def test_an_error_in_one_leaf_is_found_in_that_leaf():
    report = run(ridge.solver(lambda total, direct: {**total, "shift": 1.5 * total["shift"]}), per_leaf=True)
    leaves = {leaf.path: leaf for leaf in report.leaves}
    assert not report.ok
    assert leaves["['shift']"].relative_error == pytest.approx(0.5, rel=1e-3)
    assert leaves["['l2']"].relative_error < tol(1e-7, 1e-4)
    assert [entry.name for entry in leaves["['l2']"].entries] == [f"['l2'][{i}]" for i in range(4)]
    total, _ = true_gradients()
    for entry, gradient in zip(leaves["['l2']"].entries, total["l2"], strict=True):
        size = float(jnp.sqrt(jnp.mean(H["l2"] ** 2)))
        assert entry.reference == pytest.approx(size * float(gradient), rel=1e-6)
        assert abs(entry.reference - size * float(gradient)) < 1e-6


def test_float32_hypergradients_are_compared_with_float64_differences():
    hparams, w = ridge.hparams(jnp.float32), jnp.zeros(4, jnp.float32)
    report = check(ridge.solver(), w, hparams, ridge.data(jnp.float32), ridge.data(jnp.float32, seed=1))
    assert report.ok and report.precision == "float64" and report.tol == 1e-2
    assert 1e-9 < report.relative_error < 1e-4
    assert report.reference_error < 1e-6


def test_losses_that_fix_float32_are_compared_in_float32_and_said_so():
    def value(value, hparams, key):
        if value.dtype == jnp.float64:
            raise TypeError("only float32 here")
        return value

    hparams, w = ridge.hparams(jnp.float32), jnp.zeros(4, jnp.float32)
    report = check(ridge.solver(value=value), w, hparams, ridge.data(jnp.float32), ridge.data(jnp.float32, seed=1))
    assert report.ok and report.precision == "float32" and words(report) == {"precision"}
    assert report.relative_error < 1e-2


def test_any_pytree_of_hyperparameters_can_be_checked():
    def solver_of(read):
        def init(params, hparams, *, key=None, model_state=None):
            return params

        def hypergrad(state, hparams, train=None, valid=None, *, key=None):
            value, grad = jax.value_and_grad(lambda h: jnp.sum(jnp.sin(read(h))))(hparams)
            return Hypergradient(value, grad, ridge.make_info(), {}), state

        return Solver(init, hypergrad, lambda state, hparams: state)

    cases: list[tuple[Any, Any]] = [
        (0.3, lambda h: h),
        (jnp.asarray([0.3, 0.9]), lambda h: h**2),
        (1, lambda h: h * 2.0),
        ((jnp.asarray(0.2), None, [jnp.asarray([[0.5]])]), lambda h: h[0] * jax.tree.leaves(h)[1]),
        ({"zero": 0.0}, lambda h: h["zero"] + 0.3),
        ({"many": jnp.linspace(-1, 1, 40)}, lambda h: h["many"]),
    ]
    for hparams, read in cases:
        report = check(solver_of(read), W, hparams, per_leaf=True)
        assert report.ok, report
        assert report.relative_error < tol(1e-7, 1e-4)


# What no difference of one's own outer loss shows --------------------------------------------------------------------


def test_a_leaf_whose_hypergradient_is_a_hundred_thousandth_of_the_others_counts():
    def value(value, hparams, key):
        return value + 1e-5 * jnp.sin(hparams["small"])

    hparams = {**H, "small": jnp.asarray(0.4)}
    assert run(ridge.solver(value=value), hparams).ok
    for per_leaf in (False, True):
        wrong = ridge.solver(lambda total, direct: {**total, "small": -total["small"]}, value=value)
        report = run(wrong, hparams, per_leaf=per_leaf)
        assert not report.ok and report.relative_error < 1e-4
        (cause,) = report.causes
        assert cause.startswith("off: hparams['small']") and "the sign is wrong" in cause


@pytest.mark.parametrize("pair", [(i, j) for i in range(4) for j in range(i)])
def test_two_entries_that_are_exchanged_are_named(pair, x64):
    i, j = pair

    def swap(total, direct):
        l2 = total["l2"]
        return {**total, "l2": l2.at[i].set(l2[j]).at[j].set(l2[i])}

    report = run(ridge.solver(swap))
    assert not report.ok
    named = any(f"['l2'][{j}], hparams['l2'][{i}] are exchanged" in cause for cause in report.causes)
    # Two entries that differ by a thousandth of the whole are not told apart one by one in float32; refused they are.
    close = not x64 and report.relative_error < 1e-2 and any(c.startswith("contradicted") for c in report.causes)
    assert named or close


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.at[17].set(0.0), "hparams[17] alone in its leaf"),
        (lambda x: x.at[20:].multiply(-1.0), "hparams, from [20] to [39]"),
        (lambda x: x[::-1], "in entries all over its 40"),
        (lambda x: x.at[3].set(jnp.nan), "1 of 40 NaN or infinite, first at hparams[3]"),
    ],
)
def test_what_is_off_in_a_large_leaf_is_named(change, words):
    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        value, grad = jax.value_and_grad(lambda h: jnp.sum(jnp.sin(h)))(hparams)
        return Hypergradient(value, change(grad), ridge.make_info(), {}), state

    solver = Solver(lambda params, hparams, **kw: params, hypergrad, lambda state, hparams: state)
    report = check(solver, W, jnp.linspace(-1.0, 1.2, 40))
    assert not report.ok and any(words in cause for cause in report.causes), report


def test_leaves_that_are_exchanged_and_shapes_that_do_not_fit_are_named():
    def solver_of(change):
        def hypergrad(state, hparams, train=None, valid=None, *, key=None):
            f = lambda h: jnp.sum(h["a"] ** 2) + 0.3 * jnp.sum(jnp.sin(h["b"]))
            value, grad = jax.value_and_grad(f)(hparams)
            return Hypergradient(value, change(grad), ridge.make_info(), {}), state

        return Solver(lambda params, hparams, **kw: params, hypergrad, lambda state, hparams: state)

    hparams = {"a": jnp.asarray([0.2, 0.9, 0.4]), "b": jnp.asarray([0.3, 1.1, -0.5])}
    report = check(solver_of(lambda g: {"a": g["b"], "b": g["a"]}), W, hparams)
    assert not report.ok and "hparams['a'] has the hypergradient of hparams['b']" in " ".join(report.causes)
    for change, text in (
        (lambda g: {**g, "a": g["a"][:2]}, "hparams['a'] has shape (2,), the hyperparameter (3,)"),
        (lambda g: [g["a"], g["b"]], "the hypergradient has the structure"),
    ):
        report = check(solver_of(change), W, hparams)
        assert not report.ok and text in report.causes[0]


def test_a_solver_that_never_trains_is_refused():
    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        value, grad = jax.value_and_grad(ridge.outer_loss, argnums=1)(state, hparams, valid)
        return Hypergradient(value, grad, ridge.make_info(), {}), state

    lazy = Solver(lambda params, hparams, **kw: params, hypergrad, lambda state, hparams: state)
    report = check(lazy, W + 0.3, H, TRAIN, VALID)
    assert not report.ok and report.relative_error < tol(1e-7, 1e-4)
    assert words(report) == {"untrained", "unused"}
    assert words(check(lazy, W + 0.3, H, None, VALID)) == {"untrained"}  # losses that close over their data
    optimum = ridge.best_response(H, TRAIN)  # a start at the solution stays there, and is trained
    assert check(hg.implicit(hg.Problem(ridge_inner, ridge.outer_loss)), optimum, H, TRAIN, VALID).ok


@pytest.mark.parametrize("rows", [slice(None), slice(0, 6)])
def test_a_solver_that_does_not_read_its_data_is_refused(rows):
    right = ridge.solver()

    def hypergrad(state, hparams, train: Any = None, valid: Any = None, *, key=None):
        train = valid if rows == slice(None) else jax.tree.map(lambda x: x[rows], train)
        return right.hypergrad(state, hparams, train, valid, key=key)

    report = run(right._replace(hypergrad=hypergrad))
    assert not report.ok and words(report) == {"unused"}
    assert ("half of the rows of train" in report.causes[0]) == (rows != slice(None))


def test_a_solver_that_uses_the_hyperparameters_of_the_call_before_is_refused():
    right = ridge.solver()

    def init(params, hparams, **kw):
        return hparams

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        out, _ = right.hypergrad(ridge.State(W, (), None, {}), state, train, valid)
        return out, hparams

    report = run(Solver(init, hypergrad, lambda state, hparams: W))
    assert not report.ok and "stale" in words(report)


class Earlier(NamedTuple):
    """What a solver that remembers too much has of the calls before."""

    inner: Any
    calls: Any
    first_train: Any
    train: Any
    first_valid: Any
    hparams: Any
    grad: Any
    value: Any


def mean(out, old):
    return out._replace(grad=jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, old("grad", out.grad), out.grad))


# `old(name, new)` is the part of that name which an earlier call left, and `new` in the first call.
KEPT = {
    "nothing": lambda call, old, h, t, v: call(h, t, v),
    "the first training data": lambda call, old, h, t, v: call(h, old("first_train", t), v),
    "the training data of the call before": lambda call, old, h, t, v: call(h, old("train", t), v),
    "the first validation data": lambda call, old, h, t, v: call(h, t, old("first_valid", v)),
    "the hyperparameters of the call before": lambda call, old, h, t, v: call(old("hparams", h), t, v),
    "the hypergradient of the call before": lambda call, old, h, t, v: (out := call(h, t, v))._replace(
        grad=old("grad", out.grad)
    ),
    "a running mean of hypergradients": lambda call, old, h, t, v: mean(call(h, t, v), old),
    "the outer loss of the call before": lambda call, old, h, t, v: (out := call(h, t, v))._replace(
        value=old("value", out.value)
    ),
}


def remembering(right, what):
    """A right solver that keeps parts of its earlier calls, and uses one where it must not."""

    def init(params, hparams, **options):
        return Earlier(
            right.init(params, hparams, **options), jnp.int32(0), TRAIN, TRAIN, VALID, hparams, hparams, jnp.zeros(())
        )

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        inner = [state.inner]

        def call(h, t, v):
            out, inner[0] = right.hypergrad(state.inner, h, t, v, key=key)
            return out

        def old(name, new):
            return jax.tree.map(lambda a, b: jnp.where(state.calls == 0, b, a), getattr(state, name), new)

        out = KEPT[what](call, old, hparams, train, valid)
        first_train, first_valid = old("first_train", train), old("first_valid", valid)
        return out, Earlier(inner[0], state.calls + 1, first_train, train, first_valid, hparams, out.grad, out.value)

    return Solver(init, hypergrad, lambda state, hparams: right.response(state.inner, hparams))


@pytest.mark.parametrize("solver", ["implicit", "unrolled"])
@pytest.mark.parametrize("what", KEPT)
def test_a_solver_that_uses_what_belongs_to_an_earlier_call_is_refused(solver, what):
    problem = hg.Problem(ridge_inner, ridge.outer_loss)
    descent = hg.inner.gradient(optax.sgd(0.1), steps=600)  # far enough that a solver without `about` is believed
    right = hg.implicit(problem) if solver == "implicit" else hg.unrolled(problem, inner=descent)
    report = run(remembering(right, what))
    assert report.ok == (what == "nothing"), report
    assert report.ok or "stale" in words(report)


@pytest.mark.parametrize("level", [0.3, 0.5])
def test_a_saddle_is_refused_and_the_reference_is_that_of_the_minimum(level):
    """½(w₀ − λ)² + ¼w₁⁴ − ½λw₁²: from zeros the second parameter never moves, and w₁² = λ at the minimum."""

    def inner(w, h, batch):
        return 0.5 * (w[0] - h) ** 2 + 0.25 * w[1] ** 4 - 0.5 * h * w[1] ** 2

    def at_saddle(state, hparams, train=None, valid=None, *, key=None):
        w = jnp.where(state[1] == 0, jnp.stack([hparams, 0 * hparams]), jnp.stack([hparams, jnp.sqrt(hparams)]))
        value, grad = jax.value_and_grad(lambda h: h + jnp.where(w[1] == 0, 0, h))(hparams)
        return Hypergradient(value, grad, ridge.make_info(), {}), w

    h = jnp.asarray(level)
    own = Solver(lambda params, hparams, **kw: params, at_saddle, lambda state, hparams: state)
    report = check(own, jnp.zeros(2), h)
    assert not report.ok and words(report) >= {"saddle"}
    assert report.directions[0].reference == pytest.approx(2 * level, rel=1e-6)
    assert check(own, jnp.full(2, 0.3), h).ok
    report = check(hg.implicit(hg.Problem(inner, lambda w, h, batch: w[0] + w[1] ** 2)), jnp.zeros(2), h)
    assert not report.ok or report.directions[0].solver == pytest.approx(2 * level, rel=tol(1e-6, 1e-3))


def test_an_error_within_the_tolerance_of_float32_that_is_no_rounding_is_refused():
    hparams, w = ridge.hparams(jnp.float32), jnp.zeros(4, jnp.float32)
    data32 = ridge.data(jnp.float32), ridge.data(jnp.float32, seed=1)
    report = check(ridge.solver(lambda total, direct: scale(total, 1.005)), w, hparams, *data32)
    assert not report.ok and report.relative_error < report.tol and words(report) >= {"contradicted"}

    def rounded(total, direct):  # as much, in float32 alone
        factor = 1.005 if total["shift"].dtype == jnp.float32 else 1.0
        return scale(total, factor)

    assert check(ridge.solver(rounded), w, hparams, *data32).ok
    assert check(ridge.solver(lambda total, direct: scale(total, 1.005)), w, hparams, *data32, tol=0.01).ok


def test_an_outer_loss_that_is_not_that_of_evaluate_is_refused():
    right = ridge.solver()

    def evaluate(state, hparams, train=None, valid=None, *, key=None):
        out, state = right.hypergrad(state, hparams, train, valid, key=key)
        return out.value, out.info, state

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        out, state = right.hypergrad(state, hparams, train, valid, key=key)
        return out._replace(value=2 * out.value), state

    assert run(right._replace(evaluate=evaluate)).ok
    report = run(right._replace(evaluate=evaluate, hypergrad=hypergrad))
    assert not report.ok and words(report) == {"value"}


def test_a_loss_that_is_nan_is_advised_on_nothing_else():
    def loss(w, h, batch):
        return jnp.sum(jnp.log(-(w**2) - 1.0) + h * w**2)

    report = check(hg.implicit(hg.Problem(loss, lambda w, h, batch: jnp.sum(w))), jnp.ones(2), jnp.asarray(0.5))
    assert not report.ok and words(report) <= {"non-finite", "unreliable"} and "non-finite" in words(report)


def test_directions_differ_from_problem_to_problem_and_not_from_run_to_run():
    first, again = run(ridge.solver()), run(ridge.solver())
    other = run(ridge.solver(), scale(H, 1.0 + 1e-3))
    assert [row.solver for row in first.directions] == [row.solver for row in again.directions]
    assert abs(other.directions[0].solver - first.directions[0].solver) > 0.02 * abs(first.directions[0].solver)


# Causes --------------------------------------------------------------------------------------------------------------


def gradient_descent(steps, status=Status.OK):
    """Warm-started gradient descent with the hypergradient that would be right at its end."""

    def init(params, hparams, *, key=None, model_state=None):
        return ridge.State(params, (), model_state, {})

    def hypergrad(state, hparams, train: Any = None, valid=None, *, key=None):
        def loss(w):
            return jnp.mean((train[0] @ w - train[1]) ** 2) + jnp.sum(jnp.exp(hparams["l2"]) * w**2)

        w = jax.lax.fori_loop(0, steps, lambda i, w: w - 0.1 * jax.grad(loss)(w), state.params)
        value, (rhs, direct) = jax.value_and_grad(ridge.outer_loss, argnums=(0, 1))(w, hparams, valid)
        v = jnp.linalg.solve(jax.hessian(loss)(w), rhs)
        indirect = 2 * jnp.exp(hparams["l2"]) * w * v
        grad = {**direct, "l2": direct["l2"] - indirect}
        residual = jnp.linalg.norm(jax.grad(loss)(w))
        return Hypergradient(value, grad, ridge.make_info(inner_residual=residual, status=jnp.int32(status)), {}), (
            state._replace(params=w)
        )

    return Solver(init, hypergrad, lambda state, hparams: state.params)


def test_unconverged_is_named_with_what_more_calls_make_of_it():
    report = run(gradient_descent(3), directions=5)
    assert not report.ok and report.relative_error > 0.01
    assert report.settled_error < tol(1e-6, 1e-3)
    assert words(report) == {"unconverged"} and len(report.causes) == 2
    assert "more calls" in report.causes[1]
    assert run(gradient_descent(400)).ok


def test_a_failure_status_is_named_with_its_advice():
    report = run(gradient_descent(3, Status.INNER_MAX_STEPS))
    assert report.status is Status.INNER_MAX_STEPS
    assert any("INNER_MAX_STEPS" in cause and "max_steps" in cause for cause in report.causes)


def test_a_problem_that_is_never_solved_is_unreliable():
    slow = hg.Solver(*gradient_descent(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check(slow, W + 100, {**H, "l2": H["l2"] - 5}, TRAIN, VALID)
    assert not report.ok and "unreliable" in words(report)


def test_damped_is_named():
    report = run(hg.implicit(hg.Problem(ridge_inner, ridge.outer_loss), damping=0.3))
    assert not report.ok and words(report) == {"damped"}


def ridge_inner(w, hparams, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) + jnp.sum(jnp.exp(hparams["l2"]) * w**2)


def test_the_reference_is_solved_to_rounding_whatever_the_tolerance_asked_for():
    loose = hg.implicit(hg.Problem(ridge_inner, ridge.outer_loss), inner=hg.inner.lbfgs(tol=0.1), polish=0)
    report = run(loose, directions=5)
    assert not report.ok and "unconverged" in words(report)
    total, _ = true_gradients()
    size = float(jnp.sqrt(jnp.mean(H["l2"] ** 2)))
    for row, gradient in zip(report.directions[:4], total["l2"], strict=True):
        assert row.reference == pytest.approx(size * float(gradient), rel=1e-4, abs=1e-6)


def test_direct_is_named():
    report = run(hg.direct(hg.Problem(ridge_inner, ridge.outer_loss), inner=hg.inner.lbfgs()))
    assert not report.ok and words(report) == {"direct"}
    no_direct_part = hg.Problem(ridge_inner, lambda w, h, batch: jnp.sum(w) + h["shift"])
    report = check(hg.direct(no_direct_part, inner=hg.inner.lbfgs()), W, H, TRAIN)
    assert words(report) == {"direct", "insensitive"} and "hg.direct leaves out" in " ".join(report.causes)


def unrolled(**options):
    inner = hg.inner.gradient(optax.sgd(0.05), steps=12)
    return hg.unrolled(hg.Problem(ridge_inner, ridge.outer_loss), inner=inner, **options)


def test_an_unrolled_run_is_confirmed_with_its_metasmoothness():
    report = run(unrolled())
    assert report.ok and not report.causes
    assert report.relative_error == report.one_call_error
    assert report.metasmoothness is not None
    assert report.metasmoothness.cosine > 0.95 and report.metasmoothness.signs > 0.95
    assert run(ridge.solver()).metasmoothness is None


def test_truncated_is_named():
    report = run(unrolled(truncate=3))
    assert not report.ok and words(report) == {"truncated"}


def test_a_warm_started_unroll_is_right_for_its_own_steps_and_named_truncated():
    report = run(unrolled(warm_start=True))
    assert not report.ok and words(report) == {"truncated"}
    assert report.one_call_error < tol(1e-6, 1e-3) < 0.05 < report.relative_error


def test_a_rough_training_is_named():
    """The logistic map: after 40 steps its derivative says nothing about the next hyperparameter."""
    inner = hg.inner.fixed_point(lambda w, a, batch: a * w * (1 - w), steps=30)
    solver = hg.unrolled(hg.Problem(None, lambda w, a, batch: jnp.sum(w)), inner=inner)
    reports = [check(solver, jnp.asarray([0.3]), jnp.asarray(a), tol=1e-2) for a in (3.6, 3.7, 3.8, 3.9)]
    assert any("rough" in words(r) or "chaotic" in words(r) for r in reports)
    assert all(r.metasmoothness is not None and np.isfinite(r.metasmoothness.step) for r in reports)


def noisy(value, hparams, key):
    return value * (1 + 0.3 * jax.random.normal(key)) if key is not None else value


def test_stochastic_is_named_and_the_draw_compared():
    report = run(ridge.solver(value=noisy), key=jax.random.key(3))
    assert report.ok and words(report) - {"precision"} == {"stochastic"}
    assert 0.05 < report.key_spread < 1.5
    calm = run(ridge.solver(), key=jax.random.key(3))
    assert calm.ok and not calm.causes and calm.key_spread == 0
    assert np.isnan(run(ridge.solver()).key_spread)


def test_a_draw_that_differs_in_float64_is_compared_in_the_given_precision():
    hparams, w = ridge.hparams(jnp.float32), jnp.zeros(4, jnp.float32)

    def value(value, hparams, key):
        return value * (1 + 0.3 * jax.random.normal(key, (), value.dtype))

    report = check(
        ridge.solver(value=value),
        w,
        hparams,
        ridge.data(jnp.float32),
        ridge.data(jnp.float32, seed=1),
        key=jax.random.key(3),
    )
    assert report.precision == "float32" and report.ok and words(report) == {"precision", "stochastic"}


def test_kinked_is_named():
    def value(value, hparams, key):
        return value + 2 * jnp.abs(hparams["shift"] - 0.7)  # exactly here

    report = run(ridge.solver(value=value))
    assert not report.ok and "kinked" in words(report)
    elsewhere = run(ridge.solver(value=value), {**H, "shift": jnp.asarray(0.9)})
    assert elsewhere.ok and not elsewhere.causes


def test_insensitive_leaves_are_named_with_whether_the_loss_moves():
    extra = {**H, "lr": jnp.asarray(0.3)}
    report = run(ridge.solver(), extra)
    assert report.ok and words(report) == {"insensitive"} and "['lr'] moves nothing" in report.causes[0]

    def value(value, hparams, key):
        return value * (1 + hparams["lr"] ** 2)

    blind = ridge.solver(lambda total, direct: {**total, "lr": jnp.zeros(())}, value=value)
    report = run(blind, extra)
    assert not report.ok and words(report) == {"insensitive"} and "unrolled" in report.causes[0]


def test_a_loss_that_wriggles_makes_the_differences_unreliable():
    def value(value, hparams, key):
        return value + 1e-2 * jax.lax.stop_gradient(jnp.sin(1e7 * hparams["shift"]))

    report = run(ridge.solver(value=value))
    assert not report.ok and "unreliable" in words(report)
    assert report.reference_error > report.tol


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_numbers_are_reported_and_never_raised(bad):
    unknown = jnp.asarray(jnp.inf)
    info = lambda grad: ridge.make_info(status=jnp.int32(Status.NONFINITE_GRAD), error_estimate=unknown)
    report = run(ridge.solver(lambda total, direct: scale(total, bad), info))
    assert not report.ok and report.relative_error == np.inf and "non-finite" in words(report)
    report = run(ridge.solver(value=lambda value, hparams, key: value * bad), per_leaf=True)
    assert not report.ok and "unreliable" in words(report)
    assert "NOT confirmed" in str(report)


@pytest.mark.parametrize("status", [s for s in Status if not s.usable])
def test_every_status_has_a_cause(status):
    report = run(ridge.solver(info=lambda grad: ridge.make_info(status=jnp.int32(status))))
    assert report.status is status and any(status.name in cause for cause in report.causes)


def test_a_status_of_ones_own_is_passed_on():
    report = run(ridge.solver(info=lambda grad: ridge.make_info(status=jnp.int32(77))))
    assert report.status == 77 and "failed" in words(report) and "77" in str(report)


def test_a_zero_hypergradient_of_a_flat_loss_is_confirmed():
    flat_solver = ridge.solver(value=lambda value, hparams, key: value * 0 + 3.0)
    report = run(flat_solver)
    assert report.ok and report.relative_error == 0 and words(report) == {"insensitive"}


def test_the_table_names_directions_leaves_and_causes():
    text = str(run(ridge.solver(lambda total, direct: scale(total, 1.1)), per_leaf=True, directions=2))
    for part in (
        "NOT confirmed",
        "relative error 0.1",
        "random 2",
        "hparams['l2'] (4 entries)",
        "['l2'][3]",
        "what can be seen",
        "scaled: the hypergradient is 1.1 times",
    ):
        assert part in text
    assert max(map(len, text.splitlines()[:6])) < 100


def test_mistakes_are_named_before_anything_is_compiled():
    solver = ridge.solver()
    with pytest.raises(hg.InputTypeError, match=r"check: solver must be an hg.Solver, found 'implicit'"):
        check("implicit", W, H)  # type: ignore
    with pytest.raises(hg.InputError, match=r"check: train must be arrays, found hg.stream"):
        check(solver, W, H, hg.stream(iter([]), 1))
    with pytest.raises(hg.InputError, match=r"check: directions must be at least 1"):
        run(solver, directions=0)
    with pytest.raises(hg.InputTypeError, match=r"unknown option 'direction', did you mean 'directions'"):
        run(solver, direction=4)
    with pytest.raises(hg.InputError, match=r"hparams\['l2'\] holds 1 NaN"):
        run(solver, {**H, "l2": H["l2"].at[0].set(jnp.nan)})
    with pytest.raises(hg.InputTypeError, match=r"hparams\['l2'\] has dtype int32"):
        run(solver, {**H, "l2": jnp.arange(4, dtype=jnp.int32)})


def test_labels_outside_their_classes_are_found():
    def loss(w, hparams, batch):
        return -jnp.mean(jax.nn.log_softmax(batch[0] @ w)[jnp.arange(12), batch[1]]) + jnp.exp(hparams) * jnp.sum(w**2)

    solver = hg.unrolled(hg.Problem(loss, loss), inner=hg.inner.gradient(optax.sgd(0.1), steps=2))
    x, y = TRAIN[0], np.arange(12) % 3
    with pytest.raises(hg.InputError, match=r"train\[1\]: labels run from 0 to 2, found 3 at row 5"):
        check(solver, jnp.zeros((4, 3)), 0.3, (x, np.where(np.arange(12) == 5, 3, y)), (x, y))


def test_nan_in_the_data_is_a_warning_and_a_report():
    with pytest.warns(UserWarning, match=r"valid\[0\] holds 1 NaN"):
        report = check(ridge.solver(), W, H, TRAIN, (VALID[0].at[2, 1].set(jnp.nan), VALID[1]))
    assert not report.ok and "unreliable" in words(report)


def test_of_a_solver_that_says_nothing_only_what_is_true_of_it_is_said():
    """Whatever it calls its numbers: that of a library's method, or what its residuals mean, is not guessed."""
    names = (
        "adjoint_growth",
        "direct_norm",
        "response_residual",
        "outer_grad_norm",
        "damping",
        "gauss_newton",
        "scale",
    )
    theirs = dict.fromkeys(names, 1.0) | {"indirect_norm": 1e6}
    unknown = {"linear_residual": jnp.asarray(jnp.nan), "error_estimate": jnp.asarray(jnp.inf)}
    info = lambda grad: ridge.make_info(extra={k: jnp.asarray(v, float) for k, v in theirs.items()}, **unknown)
    right = run(ridge.solver(info=info), directions=5)
    assert right.ok and not right.causes and right.metasmoothness is None
    report = run(ridge.solver(lambda total, direct: {**total, "l2": total["l2"][::-1]}, info), directions=5)
    assert not report.ok and words(report) - {"off"} == {"wrong"}
    assert any("the method approximates on purpose, or" in cause for cause in report.causes)


def test_options_of_a_solver_that_declares_none_are_left_as_they_are():
    """Here `scale` multiplies the outer loss: setting it to zero, as for a learned response, changes the problem."""
    plain, options = ridge.solver(), {"inner": {"tol": jnp.asarray(1e-3), "max_steps": 5}, "scale": jnp.asarray(0.5)}

    def hypergrad(state, *args, **kwargs):
        out, after = plain.hypergrad(state, *args, **kwargs)
        factor = 1 + state.options["scale"]
        return out._replace(value=factor * out.value, grad=scale(out.grad, factor)), after

    init = lambda *args, **kwargs: plain.init(*args, **kwargs)._replace(options=options)
    report = run(plain._replace(init=init, hypergrad=hypergrad), directions=5)
    assert report.ok and not report.causes


def single_loop():
    """A step of the parameters and one of the adjoint a call: right in the long run, and wrong at the first call."""

    def init(params, hparams, *, key=None, model_state=None):
        return ridge.State(params, jnp.zeros_like(params), model_state, {})

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        gradient = jax.grad(ridge_inner)
        w = state.params - 0.1 * gradient(state.params, hparams, train)
        value, (rhs, direct) = jax.value_and_grad(ridge.outer_loss, argnums=(0, 1))(w, hparams, valid)
        pull = jax.vjp(lambda w, h: gradient(w, h, train), w, hparams)[1]
        v = state.inner_state - 0.1 * (pull(state.inner_state)[0] - rhs)
        grad = subtract(direct, pull(v)[1])
        info = ridge.make_info(linear_residual=jnp.asarray(jnp.nan), error_estimate=jnp.asarray(jnp.inf))
        return Hypergradient(value, grad, info, {}), state._replace(params=w, inner_state=v)

    return Solver(init, hypergrad, lambda state, hparams: state.params)


@pytest.mark.parametrize("about", [hg.About(), hg.About("mine", "optimum", trains_on=True)])
def test_a_single_loop_is_told_that_its_error_falls_from_call_to_call(about):
    report = run(single_loop()._replace(about=about), directions=5)
    assert not report.ok and report.settled_error < 0.1 * report.relative_error
    said = [cause for cause in report.causes if "more calls at the same hyperparameters" in cause]
    assert len(said) == 1
    if about.differentiates == "unknown":
        assert words(report) <= {"unconverged", "unreliable"}
        assert not any(name in cause for cause in report.causes for name in ("hg.", "max_steps", "truncate"))


def test_an_approximation_that_a_solver_declares_is_named():
    problem = hg.Problem(
        hg.compose(
            lambda w, h, b: jnp.tanh(b[0] @ w), lambda out, w, h, b: jnp.mean((out - b[1]) ** 2) + h["a"] * w @ w
        ),
        lambda w, h, b: jnp.mean((jnp.tanh(b[0] @ w) - b[1]) ** 2),
    )
    solver = hg.implicit(problem, curvature="gauss_newton")
    report = check(solver, W, {"a": jnp.asarray(0.3)}, TRAIN, VALID)
    assert not report.ok and words(report) == {"biased"} and "Gauss-Newton" in report.causes[0]
