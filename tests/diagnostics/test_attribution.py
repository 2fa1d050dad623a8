"""`hg.attribute` against closed forms: leave-one-out of ridge, groups to second order, metagradients of a run."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import relative_error, tol
from tests.diagnostics._newton import newton

N, D, Q = 24, 3, 4
L2 = 0.3
EXACT = newton
INNER = hg.compose(
    lambda w, l2, batch: batch[0] @ w,
    lambda out, w, l2, batch: jnp.mean((out - batch[1]) ** 2) / 2 + l2 / 2 * jnp.sum(w**2),
)
SQUARES = hg.Problem(
    lambda w, l2, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2 + l2 / 2 * jnp.sum(w**2),
    lambda w, l2, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2),
)
LINEAR = hg.Problem(SQUARES.inner_loss, lambda w, l2, batch: jnp.mean(batch[0] @ w))


def draw(seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x, xq, w = rng.normal(size=(N, D)), rng.normal(size=(Q, D)), rng.normal(size=D)
    return (x, x @ w + 0.5 * rng.normal(size=N)), (xq, xq @ w + rng.normal(size=Q))


def arrays(data: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), data)


TRAIN, QUERIES = draw()


def fitted(weight: np.ndarray) -> np.ndarray:
    """The ridge solution with so much weight on each row."""
    x, y = TRAIN
    p = weight / weight.sum()
    return np.linalg.solve(x.T @ (p[:, None] * x) + L2 * np.eye(D), x.T @ (p * y))


def losses(w: np.ndarray) -> np.ndarray:
    return (QUERIES[0] @ w - QUERIES[1]) ** 2


def without(rows: Any) -> np.ndarray:
    """What leaving out these rows changes, computed by solving again."""
    weight = np.ones(N)
    weight[rows] = 0
    return losses(fitted(weight)) - losses(fitted(np.ones(N)))


def along(rows: Any, s: float) -> np.ndarray:
    """The losses of the queries on the way from all rows (s = 0) to those without the group (s = 1)."""
    weight = np.full(N, 1 / N)
    left = np.ones(N, bool)
    left[rows] = False
    return losses(fitted((1 - s) * weight + s * left / left.sum()))


def first_order(rows: Any, step: float = 1e-4) -> np.ndarray:
    return (along(rows, step) - along(rows, -step)) / (2 * step)


def attribute(problem: hg.Problem = SQUARES, **options: Any) -> hg.diagnostics.Attribution:
    options = {"method": EXACT} | options
    return hg.attribute(problem, jnp.zeros(D), L2, arrays(TRAIN), arrays(QUERIES), **options)


@pytest.fixture(scope="module")
def scores() -> np.ndarray:
    return attribute().scores


def test_scores_of_ridge_are_the_derivative_of_its_closed_form_and_predict_leaving_one_out(scores):
    expected = np.stack([first_order([i]) for i in range(N)], axis=1)
    assert relative_error(scores, expected) < tol(1e-7, 1e-4)
    exact = np.stack([without([i]) for i in range(N)], axis=1)
    assert relative_error(scores, exact) < 0.3  # to first order: a leverage of D / N is left
    assert np.median(hg.diagnostics.loo_correlation(scores, exact.T)) > 0.99


def test_the_default_method_says_how_accurate_it_is(scores):
    found = attribute(method=hg.implicit)
    assert relative_error(found.scores, scores) < tol(1e-7, 1e-3)
    assert (found.status <= hg.Status.INSENSITIVE).all()
    assert found.error_estimate.shape == (Q,)
    assert (found.error_estimate < 1e-2).all()


def test_scores_add_up_over_groups_and_the_second_order_term_is_that_of_the_closed_form(scores):
    labels = np.arange(N) * 7 % 5
    found = attribute(groups=labels)
    assert relative_error(found.scores, np.stack([scores[:, labels == g].sum(1) for g in range(5)], axis=1)) < tol(
        1e-9, 1e-4
    )
    groups, step = [np.flatnonzero(labels == g) for g in range(5)], 1e-3
    second = lambda rows: (along(rows, step) - 2 * along(rows, 0.0) + along(rows, -step)) / step**2
    expected = np.stack([first_order(rows) + second(rows) / 2 for rows in groups], axis=1)
    assert relative_error(found.removal, expected) < tol(1e-5, 1e-3)
    exact = np.stack([without(rows) for rows in groups], axis=1)
    assert relative_error(found.removal, exact) < relative_error(found.scores, exact) / 2


def test_the_third_derivative_of_the_inner_loss_is_part_of_the_second_order_term():
    """One parameter, whose optimum moves on a curve: h = mean (e^w − x w), w* = log mean x; f = w."""
    x = np.asarray([0.5, 1.0, 1.2, 2.0, 3.0, 4.0])
    problem = hg.Problem(lambda w, h, batch: jnp.mean(jnp.exp(w) - batch * w), lambda w, h, batch: jnp.mean(batch) * w)
    found = hg.attribute(
        problem, jnp.zeros(()), None, arrays(x), jnp.ones(1), groups=[[0, 5], [1], [2, 3, 4]], method=EXACT
    )
    for g, rows in enumerate([[0, 5], [1], [2, 3, 4]]):
        move = (np.delete(x, rows).mean() - x.mean()) / x.mean()  # w* moves by log(1 + move)
        np.testing.assert_allclose(found.removal[0, g], move - move**2 / 2, rtol=tol(1e-7, 1e-3))


def test_groups_may_be_lists_of_rows_in_any_order(scores):
    parts = [np.arange(5, N), np.asarray([3, 1, 0]), [2, 4]]
    found = attribute(groups=parts)
    assert relative_error(found.scores, np.stack([scores[:, part].sum(1) for part in parts], axis=1)) < tol(1e-9, 1e-4)
    named = attribute(groups=["even" if i % 2 == 0 else "odd" for i in range(N)])
    assert named.names == ("even", "odd")
    assert relative_error(named.scores[:, 0], scores[:, ::2].sum(1)) < tol(1e-9, 1e-4)


def test_a_twin_has_the_same_score_and_permuting_examples_permutes_scores(scores):
    order = np.random.default_rng(1).permutation(N)
    shuffled = hg.attribute(
        SQUARES, jnp.zeros(D), L2, arrays(jax.tree.map(lambda x: x[order], TRAIN)), arrays(QUERIES), method=EXACT
    )
    assert relative_error(shuffled.scores, scores[:, order]) < tol(1e-9, 1e-4)
    twins = arrays(jax.tree.map(lambda x: np.concatenate([x[:-1], x[:1]]), TRAIN))
    doubled = hg.attribute(SQUARES, jnp.zeros(D), L2, twins, arrays(QUERIES), method=EXACT).scores
    np.testing.assert_allclose(doubled[:, 0], doubled[:, -1], rtol=tol(1e-9, 1e-4))


@pytest.mark.parametrize("memory", [2000, 4000])
def test_chunks_of_queries_and_rows_change_nothing(scores, memory):
    assert relative_error(attribute(memory=memory).scores, scores) < tol(1e-9, 1e-4)


def test_metagradients_are_central_differences_of_the_run():
    x, y = TRAIN
    steps, rate = 7, 0.2
    run = lambda problem: hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(rate), steps=steps), mode="reverse")
    found = attribute(method=run)

    def after(i: int, s: float) -> np.ndarray:
        p = np.full(N, 1 / N) * (1 - s)
        p[np.arange(N) != i] += s / (N - 1)
        w = np.zeros(D)
        for _ in range(steps):
            w = w - rate * (x.T @ (p * (x @ w - y)) + L2 * w)
        return losses(w)

    expected = np.stack([(after(i, 1e-4) - after(i, -1e-4)) / 2e-4 for i in range(N)], axis=1)
    assert relative_error(found.scores, expected) < tol(1e-7, 1e-4)
    assert found.second_order is None


def test_one_step_on_a_minibatch_is_linear_in_what_is_left_out(key):
    """For a query linear in the parameters the score is then the whole change."""
    once = lambda problem: hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.1), steps=1), mode="reverse")
    batches = hg.minibatches(arrays(TRAIN), 10)
    given = (LINEAR, jnp.ones(D), L2, batches, arrays(QUERIES))
    found = hg.attribute(*given, method=once, key=key)
    again = hg.diagnostics.retrain(*given, [[0], [3], [7, 8]], method=once, key=key)
    expected = np.stack([found.scores[:, 0], found.scores[:, 3]])
    assert relative_error(again.changes[:2], expected) < tol(1e-8, 1e-3)
    step = (N - 1) / (N - 2)  # a group of two goes a little further than the sum of its two rows
    assert relative_error(again.changes[2], step * found.scores[:, [7, 8]].sum(1)) < tol(1e-8, 1e-3)
    assert np.ptp(found.scores) > 0


def test_influence_at_parameters_that_stay_where_they_are(scores):
    """At the optimum of a convex loss the Gauss-Newton matrix is the Hessian, and damping takes away from it."""
    held = {"inner": hg.inner.gradient(optax.set_to_zero(), steps=1), "linear": hg.linear.dense()}
    gauss = functools.partial(hg.implicit, **held, curvature="gauss_newton", damping=1e-12)
    problem, start = hg.Problem(INNER, SQUARES.outer_loss), jnp.asarray(fitted(np.ones(N)), jnp.result_type(float))
    given = (problem, start, L2, arrays(TRAIN), arrays(QUERIES))
    assert relative_error(hg.attribute(*given, method=gauss).scores, scores) < tol(1e-8, 1e-3)
    damped = functools.partial(hg.implicit, **held, curvature="gauss_newton", damping=1.0)
    assert np.linalg.norm(hg.attribute(*given, method=damped).scores) < 0.9 * np.linalg.norm(scores)


def test_losses_that_draw_are_averaged_before_they_are_judged(key):
    def noisy(w, l2, batch, key):
        keep = jax.random.bernoulli(key, 0.8, jnp.shape(batch[0])) / 0.8
        return jnp.mean(((batch[0] * keep) @ w - batch[1]) ** 2) + l2 * jnp.sum(w**2)

    run = lambda problem: hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.1), steps=3), mode="reverse")
    problem = hg.Problem(noisy, SQUARES.outer_loss)
    found = hg.attribute(problem, jnp.ones(D), L2, arrays(TRAIN), arrays(QUERIES), method=run, key=key)
    assert np.isfinite(found.scores).all()
    with_sum = hg.Problem(lambda w, l2, batch, key: len(batch[1]) * noisy(w, l2, batch, key), SQUARES.outer_loss)
    with pytest.raises(hg.InputError, match="must be a mean over rows"):
        hg.attribute(with_sum, jnp.ones(D), L2, arrays(TRAIN), arrays(QUERIES), method=run, key=key)


def test_a_query_whose_status_is_not_usable_has_no_scores():
    queries = jax.tree.map(lambda x: jnp.asarray(x).at[1].set(jnp.nan), arrays(QUERIES))
    found = hg.attribute(SQUARES, jnp.zeros(D), L2, arrays(TRAIN), queries, method=EXACT)
    assert found.status.tolist().index(hg.Status.NONFINITE_LOSS) == 1
    assert np.isnan(found.scores[1]).all()
    assert np.isfinite(found.scores[[0, 2, 3]]).all()
    assert "queries 1 have no scores" in str(found)
    with pytest.raises(hg.InputError, match=r"query 1 has no scores, since its status is NONFINITE_LOSS"):
        found.top(1)


def test_a_solve_that_ends_early_gives_nan_with_its_status():
    wrong = jnp.int32(hg.Status.INNER_MAX_STEPS)

    def early(problem: hg.Problem) -> hg.Solver:
        """Usable for queries, but not where it is asked how the optimum moves."""
        right = newton(problem)

        def hypergrad(state, hparams, train=None, valid=None, *, key=None):
            out, state = right.hypergrad(state, hparams, train, valid)
            status = jnp.where(isinstance(valid, dict) or not moves, wrong, out.info.status)
            return out._replace(info=out.info._replace(status=status)), state

        return right._replace(hypergrad=hypergrad)

    moves = False
    found = attribute(method=early)
    assert (found.status == hg.Status.INNER_MAX_STEPS).all()
    assert np.isnan(found.scores).all()
    moves = True
    found = attribute(method=early, groups=np.arange(N) % 3)
    assert np.isfinite(found.scores).all()
    assert np.isnan(found.removal).all()


REFUSED = {
    "sum": (lambda w, l2, b: jnp.sum((b[0] @ w - b[1]) ** 2), "must be a mean over rows.*two halves.*jnp.mean"),
    "penalty by rows": (
        lambda w, l2, b: jnp.mean((b[0] @ w - b[1]) ** 2) + jnp.sum(w**2) / b[1].shape[0],
        "must be a mean over rows.*scale a penalty",
    ),
    "batch norm": (
        lambda w, l2, b: jnp.mean(((b[0] @ w - jnp.mean(b[0] @ w)) - b[1]) ** 2) + l2 * jnp.sum(w**2),
        "must be a mean over rows",
    ),
}


@pytest.mark.parametrize(("loss", "message"), REFUSED.values(), ids=REFUSED)
def test_losses_that_are_no_mean_over_rows_are_refused(loss, message):
    with pytest.raises(hg.InputError, match=message):
        attribute(hg.Problem(loss, SQUARES.outer_loss))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (np.zeros(N - 1, int), f"groups has {N - 1} labels and train has {N} rows"),
        (np.zeros(N, int), f"holds all {N} rows"),
        (np.r_[-1, np.zeros(N - 1, int)], r"groups\[0\] is -1, which is no group"),
        ([None, *["a"] * (N - 1)], "leaves out row 0"),
        ([[0, 1], [2, 3]], rf"do not cover the rows of train: {N - 4} of {N}"),
        ([range(N - 1)], "do not cover"),
        ([[0, N], range(N)], rf"groups\[0\] must hold different row numbers from 0 to {N - 1}"),
        ([[], range(N)], r"groups\[0\] is empty"),
        (np.zeros((2, 3, 4)), "labels or lists of row numbers"),
        (7, "labels or lists"),
    ],
)
def test_groups_that_do_not_cover_the_rows_are_refused(groups, message):
    with pytest.raises((hg.InputError, hg.InputTypeError), match=message):
        attribute(groups=groups)


X, Y = arrays(QUERIES)


@pytest.mark.parametrize("queries", [(X,), {"x": X, "y": Y}, (X[:, :2], Y), X, (X, Y, Y)], ids=str)
def test_queries_of_another_structure_are_refused(queries):
    paired = lambda w, l2, batch: (lambda x, y: jnp.mean((x @ w - y) ** 2))(*batch)
    with pytest.raises(hg.InputError, match=r"attribute: outer_loss cannot be evaluated on a row of queries"):
        hg.attribute(hg.Problem(SQUARES.inner_loss, paired), jnp.zeros(D), L2, arrays(TRAIN), queries)


def test_mistakes_are_named_before_anything_compiles(key):
    train, queries = arrays(TRAIN), arrays(QUERIES)
    call = functools.partial(hg.attribute, SQUARES, jnp.zeros(D), L2, train, queries)
    with pytest.raises(hg.InputTypeError, match=r"method must be a function .* found an hg.Solver"):
        call(method=EXACT(SQUARES))  # pyright: ignore[reportArgumentType]
    with pytest.raises(hg.InputTypeError, match=r"missing a required .*argument: 'inner'.*hg.unrolled\(problem"):
        call(method=hg.unrolled)  # pyright: ignore[reportArgumentType]
    with pytest.raises(hg.InputTypeError, match=r"method must return an hg.Solver, found NoneType"):
        call(method=lambda problem: None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(hg.InputError, match=r"memory must hold one query with a single row"):
        call(memory=100)
    with pytest.raises(hg.InputError, match=r"with the whole batch of a loss made by hg.compose"):
        hg.attribute(hg.Problem(INNER, SQUARES.outer_loss), jnp.zeros(D), L2, train, queries, memory=500)
    with pytest.raises(hg.InputTypeError, match="train is traced"):
        jax.jit(lambda t: hg.attribute(SQUARES, np.zeros(D), L2, t, queries).scores)(train)
    with pytest.raises(hg.InputTypeError, match=r"train is hg\.stream"):
        hg.attribute(SQUARES, jnp.zeros(D), L2, hg.stream([train], 1), queries)
    with pytest.raises(hg.InputError, match="train must be arrays with one row an example, found None"):
        hg.attribute(SQUARES, jnp.zeros(D), L2, None, queries)
    with pytest.raises(hg.InputError, match="queries must be arrays with one row an example, found None"):
        hg.attribute(SQUARES, jnp.zeros(D), L2, train, None)
    with pytest.raises(hg.InputTypeError, match="queries must be arrays"):
        hg.attribute(SQUARES, jnp.zeros(D), L2, train, hg.minibatches(queries, 2), key=key)
    with pytest.raises(hg.InputError, match=r"draw at random: pass key="):
        hg.attribute(SQUARES, jnp.zeros(D), L2, hg.minibatches(train, 2), queries)
    with pytest.raises(hg.InputError, match="at least 2 rows"):
        hg.attribute(SQUARES, jnp.zeros(D), L2, jax.tree.map(lambda x: x[:1], train), queries)
    with pytest.raises(hg.InputError, match="inner_loss is None"):
        hg.attribute(hg.Problem(None, SQUARES.outer_loss), jnp.zeros(D), L2, train, queries)
    state = hg.Problem(lambda w, h, b, s: (jnp.mean(w), s), lambda w, h, b, s: jnp.mean(w), model_state=True)
    with pytest.raises(hg.InputError, match="model_state=True, as batch norm does, which mixes the rows"):
        hg.attribute(state, jnp.zeros(D), L2, train, queries)


def test_top_orders_what_helped_and_what_harmed(scores):
    found = attribute()
    top = found.top(2, 3)
    assert top.helpful.tolist() == np.argsort(-scores[2])[:3].tolist()
    assert top.harmful.tolist() == np.argsort(scores[2])[:3].tolist()
    np.testing.assert_array_equal(top.harmful_scores, found.scores[2, top.harmful])
    assert len(found.top(0, 10**6).helpful) == N
    with pytest.raises(hg.InputError, match=f"must be a row of the {Q} queries, found {Q}"):
        found.top(Q)


def test_a_table_has_a_row_for_each_query_and_a_column_for_each_name(monkeypatch):
    pytest.importorskip("pandas")
    found = hg.diagnostics.Attribution(np.eye(2), np.zeros(2, int), np.zeros(2), None, ("cats", "dogs"))
    frame = found.to_pandas()
    assert frame.loc[1, "dogs"] == 1
    assert list(frame.columns) == ["cats", "dogs"]
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(hg.HypergradError, match=r"to_pandas needs pandas: pip install"):
        found.to_pandas()


def test_a_chunk_takes_about_the_memory_that_it_was_given():
    """A hundred queries and 300 rows of a wide layer would take 60 MB at once."""
    from hypergrad.diagnostics import _left_out, attribution

    x = jnp.asarray(np.random.default_rng(0).normal(size=(300, 8)), jnp.result_type(float))
    problem = hg.Problem(
        lambda w, h, batch: jnp.mean(jnp.tanh(batch @ w) ** 2), lambda w, h, batch: jnp.mean(jnp.tanh(batch @ w))
    )
    at = _left_out.setting("attribute", problem, jnp.ones((8, 64)), None, x, x[:100], None)
    taken = []
    for memory in (1e9, 3e6):
        width, piece = attribution._fit("attribute", problem, at, 300, memory, None)
        columns = _left_out.every_row(300)
        method = lambda p: hg.unrolled(p, inner=hg.inner.gradient(optax.sgd(0.1), steps=2), mode="reverse")
        run = attribution._Run(problem, method, at, columns, piece, None)
        chunk = attribution.chunks(at.queries, at.queried, width)[0]
        program = run.gradient.lower(at.params, at.hparams, at.train, chunk, forced=False).compile()
        taken.append(program.memory_analysis().temp_size_in_bytes)  # pyright: ignore[reportOptionalMemberAccess]
    assert taken[1] < 2 * 3e6 < taken[0]
