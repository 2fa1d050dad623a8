"""Updates that are not the gradient of the loss are refused or differentiated as they are; those that are, are left
alone, whatever they hold back.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad._jaxpr.semigradient import check_gradient, is_gradient, released

held = jax.lax.stop_gradient
RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(6, 3))), jnp.arange(6) % 2
PARAMS = {"w": jnp.asarray(0.3 * RNG.normal(size=(3, 2))), "b": jnp.asarray(0.3 * RNG.normal(size=2))}
DOUBLE = X.dtype == jnp.float64


def outputs(p):
    return X @ p["w"] + p["b"][None]


def decay(p, h=0.1):
    return h * sum(jnp.sum(x**2) for x in jax.tree.leaves(p))


@jax.custom_vjp
def rounded(x):
    return jnp.round(x)


@jax.custom_jvp
def signs(x):
    return jnp.sign(x)


@jax.custom_vjp
def reversed_gradient(x):
    return x


@jax.custom_vjp
def clipped_gradient(x):
    return x


@jax.custom_jvp
def own_square(x):
    return x**2


@jax.custom_vjp
def own_cube(x):
    return x**3


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
signs.defjvp(lambda primals, tangents: (jnp.sign(primals[0]), tangents[0]))
reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))
clipped_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))
own_square.defjvp(lambda primals, tangents: (primals[0] ** 2, 2 * primals[0] * tangents[0]))
own_cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))


def temporal_difference(p, h):
    z = outputs(p)
    return jnp.mean((z - 1 - h * held(jnp.roll(z, 1, 0))) ** 2) + decay(p)


def distilled(p, h):
    z = outputs(p)
    return -jnp.mean(jnp.sum(held(jax.nn.softmax(z / 2)) * jax.nn.log_softmax(z + X[:, :2]), -1)) + decay(p, h)


def in_a_scan(p, h):
    def row(total, x):
        return total + jnp.sum((x @ p["w"] - held(h * jnp.roll(x, 1) @ p["w"]) - 1) ** 2), None

    return jax.lax.scan(row, jnp.zeros((), X.dtype), X)[0] / 6 + decay(p)


def balanced(p, h):
    fit, size = jnp.mean((outputs(p) - 1) ** 2), decay(p, 1.0)
    return fit / held(fit) + h * size / held(size)


def normalized_by_held_statistics(p, h):
    z = outputs(p)
    return jnp.mean(((z - held(z.mean(0)[None])) / held(z.std(0)[None] + 1) - X[:, :2]) ** 2) + decay(p, h)


def half_held(p, h):
    return jnp.mean((outputs(p) - 0.5 * held(outputs(p)) - h) ** 2)


def in_a_branch(p, h):
    return jax.lax.cond(jnp.sum(p["b"]) > 1e9, lambda: 0 * half_held(p, h), lambda: half_held(p, h)) + decay(p)


# Losses f(params, h) whose computed gradient is not their gradient; smooth ones, of which a step has a derivative.
SMOOTH = {
    "the snippet": lambda p, h: 0.5 * jnp.sum((p["w"] - held(0.5 * p["w"]) - h) ** 2) + decay(p),
    "temporal differences": temporal_difference,
    "self-distillation": distilled,
    "reweighted by the error": lambda p, h: (
        jnp.mean(held(jnp.abs(outputs(p) - 1)) * (outputs(p) - 1) ** 2) + decay(p, h)
    ),
    "weights over a held norm": lambda p, h: (
        jnp.mean((X @ (p["w"] / held(jnp.linalg.norm(p["w"]))) - h) ** 2) + decay(p)
    ),
    "a target in a scan": in_a_scan,
    "losses over their values": balanced,
    "held batch statistics": normalized_by_held_statistics,
    "half of the output": half_held,
    "in jit": jax.jit(half_held),
    "in remat": jax.checkpoint(half_held),
    "in a branch": in_a_branch,
    "in vmap": lambda p, h: jnp.mean(jax.vmap(lambda x: jnp.sum((x @ p["w"] - 0.5 * held(x @ p["w"]) - h) ** 2))(X)),
    "a copy of the other layer": lambda p, h: jnp.mean((outputs(p) - h * held(jnp.sum(p["w"])) - 1) ** 2) + decay(p),
    "a gradient reversed": lambda p, h: (
        jnp.mean((X @ p["w"] + 0.1 * reversed_gradient(p["b"])[None] - h) ** 2) + decay(p)
    ),
}
STEPPED = {
    "straight through": lambda p, h: jnp.mean((X @ (p["w"] + held(jnp.round(p["w"]) - p["w"])) - h) ** 2),
    "quantised outputs": lambda p, h: jnp.mean(
        (outputs(p) + held(jnp.round(4 * outputs(p)) / 4 - outputs(p)) - h) ** 2
    ),
    "straight through by a rule": lambda p, h: jnp.mean((X @ rounded(p["w"]) - h) ** 2) + decay(p),
    "binary weights by a rule": lambda p, h: jnp.mean((X @ signs(p["w"]) - h) ** 2) + decay(p),
    "a gradient clipped in the loss": lambda p, h: jnp.mean((clipped_gradient(outputs(p)) - h) ** 2) + decay(p),
}


def cross_entropy(log_probs):
    return -jnp.mean(jnp.take_along_axis(log_probs, Y[:, None], 1))


def by_hand(p):
    z = outputs(p)
    z = z - held(z.max(-1, keepdims=True))
    return jnp.mean(jnp.log(jnp.exp(z).sum(-1)) - z[jnp.arange(6), Y])


def masked(p):
    z = outputs(p)
    e = jnp.where(jnp.arange(2)[None] < 1, jnp.exp(z - held(z.max(-1, keepdims=True))), 0.0)
    return jnp.mean(jnp.log(e.sum(-1))) + jnp.mean(held(jnp.max(z, -1)))


def attention(p):
    z = outputs(p)
    return jnp.mean((jax.nn.softmax(z @ z.T, axis=-1) @ z) ** 2)


def unnormalized_attention(p):
    z = outputs(p)
    e = jnp.exp(z - held(z.max(-1, keepdims=True)))
    return jnp.mean((e @ X[:2]) / e.sum(-1, keepdims=True))


def scaled_norm(p):
    largest = held(jnp.max(jnp.abs(p["w"])))
    return largest * jnp.sqrt(jnp.sum((p["w"] / largest) ** 2))


def rows_in_a_scan(p):
    row = lambda total, x: (total + jax.nn.logsumexp(x @ p["w"]), None)
    return jax.lax.scan(row, jnp.zeros((), X.dtype), X)[0]


# Losses f(params) whose computed gradient is their gradient, or differs where that does no harm.
RIGHT = {
    "softmax": lambda p: cross_entropy(jnp.log(jax.nn.softmax(outputs(p)))),
    "log_softmax": lambda p: cross_entropy(jax.nn.log_softmax(outputs(p))),
    "logsumexp": lambda p: jnp.mean(jax.nn.logsumexp(outputs(p), -1)),
    "logsumexp over rows": lambda p: jnp.mean(jax.nn.logsumexp(outputs(p), 0)),
    "logsumexp with weights": lambda p: jnp.mean(jax.nn.logsumexp(outputs(p), -1, b=jnp.arange(1.0, 3.0)[None])),
    "softmax with where": lambda p: jnp.mean(jax.nn.softmax(outputs(p), where=jnp.arange(2)[None] < 1, axis=-1)[:, 0]),
    "labels of optax": lambda p: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs(p), Y)),
    "one-hot labels of optax": lambda p: jnp.mean(optax.softmax_cross_entropy(outputs(p), jax.nn.one_hot(Y, 2))),
    "smoothed labels": lambda p: jnp.mean(
        optax.softmax_cross_entropy(outputs(p), optax.smooth_labels(jax.nn.one_hot(Y, 2), 0.1))
    ),
    "binary labels of optax": lambda p: jnp.mean(optax.sigmoid_binary_cross_entropy(outputs(p)[:, 0], Y)),
    "relu": lambda p: jnp.mean(jax.nn.relu(outputs(p))),
    "gelu and silu": lambda p: jnp.mean(jax.nn.gelu(outputs(p)) + jax.nn.silu(outputs(p))),
    "logaddexp": lambda p: jnp.mean(jnp.logaddexp(outputs(p), 0.0)),
    "clip and huber": lambda p: jnp.mean(jnp.clip(outputs(p), -1, 1) + optax.huber_loss(outputs(p))),
    "softmax by hand": by_hand,
    "masked by hand": masked,
    "attention": attention,
    "attention by hand": unnormalized_attention,
    "norm by hand": scaled_norm,
    "rows in a scan": rows_in_a_scan,
    "batch statistics": lambda p: jnp.mean(jax.nn.standardize(outputs(p), 0) ** 3),
    "a frozen layer": lambda p: jnp.mean((X @ p["w"] + held(p["b"])[None] - 1) ** 2),
    "a mask of weights": lambda p: jnp.mean((X @ (p["w"] * held(jnp.abs(p["w"]) > 0.1)) - 1) ** 2),
    "a mask of outputs": lambda p: jnp.mean(held((outputs(p) > 0).astype(X.dtype)) * outputs(p) ** 2),
    "held data": lambda p: jnp.mean((held(X) @ p["w"] - held(Y[:, None] * 1.0)) ** 2),
    "a loss over its value": lambda p: jnp.mean((outputs(p) - 1) ** 2) / held(jnp.mean((outputs(p) - 1) ** 2)),
    "a determinant": lambda p: jnp.linalg.slogdet(p["w"].T @ p["w"] + jnp.eye(2))[1],
    "right rules of one's own": lambda p: jnp.sum(own_square(outputs(p)) + own_cube(outputs(p))),
    "rounded data": lambda p: jnp.mean((outputs(p) - jnp.round(X[:, :2])) ** 2),
    "rounded outputs, held": lambda p: jnp.mean((outputs(p) - held(jnp.round(outputs(p)))) ** 2),
}


@pytest.mark.parametrize("name", [*SMOOTH, *STEPPED])
def test_what_is_no_gradient_is_refused_with_the_parameters_and_what_to_write(name):
    loss = (SMOOTH | STEPPED)[name]
    with pytest.raises(hg.InputError, match=r"hg.implicit: .*params\['[wb]'\].*hg\.inner\.fixed_point.*hg\.unrolled"):
        check_gradient(lambda p: loss(p, 0.5), PARAMS, "hg.implicit")
    assert not is_gradient(lambda p: loss(p, 0.5), PARAMS)


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_a_gradient_is_left_alone(name):
    check_gradient(RIGHT[name], PARAMS, "hg.implicit")


def test_softmax_is_known_by_algebra_and_costs_no_program():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hypergrad._jaxpr.semigradient._agrees_without", lambda closed: pytest.fail("evaluated"))
        for name in ("softmax", "log_softmax", "logsumexp", "labels of optax", "attention", "norm by hand", "relu"):
            check_gradient(RIGHT[name], PARAMS, "hg.implicit")


def test_the_check_works_on_traced_values_and_data():
    def refused(p, x, h):
        loss = lambda p: jnp.mean((x @ p["w"] - h * held(x @ p["w"]) - 1) ** 2)
        with pytest.raises(hg.InputError, match=r"params\['w'\]:"):
            check_gradient(loss, p, "hg.implicit")
        shifted = lambda p: jnp.mean(jnp.log(jnp.exp(x @ p["w"] - held(x @ p["w"])).sum(-1)) + held(x @ p["w"])[:, 0])
        with pytest.raises(hg.InputError, match=r"params\['w'\]:"):  # a shift of its own for every class
            check_gradient(shifted, p, "hg.implicit")
        check_gradient(lambda p: by_hand(p) + h * jnp.sum(p["w"] ** 2) + jnp.sum(x), p, "hg.implicit")
        return h

    jax.eval_shape(refused, PARAMS, X, 0.5)


@functools.cache
def hypergradients(mode, *names):
    """By `hg.unrolled` and by central differences of training, for several members in one program."""
    step = 1e-5 if DOUBLE else 1e-2

    def both(h):
        found = {}
        for name in names:
            problem = hg.Problem(
                lambda p, h, b, loss=SMOOTH[name]: loss(p, h),
                lambda p, h, b: jnp.sum((p["w"] - 1) ** 2) + jnp.sum(p["b"]),
            )
            inner = hg.inner.gradient(optax.sgd(0.1, momentum=0.5), steps=4)
            solver = hg.unrolled(problem, inner=inner, mode=mode, remat="none")
            value = lambda h, solver=solver: solver.evaluate(solver.init(PARAMS, h), h)[0]
            out = solver.hypergrad(solver.init(PARAMS, h), h)[0]
            sides = jax.vmap(value)(jnp.stack([h + step, h - step]))
            found[name] = out.grad, (sides[0] - sides[1]) / (2 * step)
        return found

    return jax.jit(both)(jnp.asarray(0.7, X.dtype))


@pytest.mark.parametrize(
    "case",
    [
        ("reverse", "temporal differences", "self-distillation", "a target in a scan", "a gradient reversed"),
        ("forward", "in a branch"),
    ],
)
def test_unrolled_differentiates_the_update_that_is_made(case):
    for name, (found, expected) in hypergradients(*case).items():
        rtol, atol = (1e-6, 1e-8) if DOUBLE else (2e-2, 2e-2)
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=name)


TARGET = lambda w, h, b: 0.5 * jnp.sum((w - held(0.5 * w) - h) ** 2)
OUTER = lambda w, h, b: jnp.sum((w - 1.0) ** 2)


@pytest.mark.parametrize(
    "update",
    [
        lambda w, h, b: w - 0.3 * jax.grad(TARGET)(w, h, b),  # with stop_gradient inside
        lambda w, h, b: w - 0.3 * jax.grad(lambda v: 0.5 * jnp.sum((v - 0.5 * w - h) ** 2))(w),  # with an argument
    ],
)
def test_fixed_point_is_right_however_the_update_is_written(update):
    """w = 2h, so that d/dh (2h − 1)² = 4 (2h − 1)."""
    solver = hg.implicit(hg.Problem(None, OUTER), inner=hg.inner.fixed_point(update))
    out, _ = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(1), 0.3), 0.3)
    np.testing.assert_allclose(out.grad, -1.6, rtol=1e-8 if DOUBLE else 1e-4)


def test_root_is_right_and_proximal_refuses():
    equations = lambda w, h, b: jax.grad(TARGET)(w, h, b)
    solver = hg.implicit(hg.Problem(None, OUTER), inner=hg.inner.root(equations))
    out, _ = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(1), 0.3), 0.3)
    np.testing.assert_allclose(out.grad, -1.6, rtol=1e-6 if DOUBLE else 1e-3)
    solver = hg.implicit(hg.Problem(TARGET, OUTER), inner=hg.inner.proximal(lambda w, h, step: w))
    with pytest.raises(hg.InputError, match=r"hg\.inner\.proximal: .*stop_gradient.*hg\.inner\.fixed_point"):
        solver.hypergrad(solver.init(jnp.zeros(1), 0.3), 0.3)


def test_best_response_refuses_and_fixed_point_serves():
    with pytest.raises(hg.InputError, match=r"hg\.best_response: .*params: stop_gradient"):
        hg.best_response(hg.Problem(TARGET, OUTER))(0.3, jnp.zeros(1))
    update = lambda w, h, b: w - 0.3 * jax.grad(TARGET)(w, h, b)
    w_star = hg.best_response(hg.Problem(None, OUTER), inner=hg.inner.fixed_point(update))
    np.testing.assert_allclose(jax.grad(lambda h: w_star(h, jnp.zeros(1))[0])(0.3), 2, rtol=1e-8 if DOUBLE else 1e-4)


def test_implicit_refuses():
    problem = hg.Problem(TARGET, OUTER)
    solver = hg.implicit(problem)
    with pytest.raises(hg.InputError, match=r"hg\.implicit: .*stop_gradient.*hg\.inner\.fixed_point"):
        solver.hypergrad(solver.init(jnp.zeros(1), 0.3), 0.3)


def test_released_lets_go_what_depends_on_the_first_argument_only():
    function = lambda w, h: w * held(h) + held(w**2)
    np.testing.assert_allclose(jax.grad(released(function), argnums=0)(3.0, 2.0), 2 + 6)
    np.testing.assert_allclose(jax.grad(released(function), argnums=1)(3.0, 2.0), 0)
    shifted = jax.nn.logsumexp
    assert "stop_gradient" in str(jax.make_jaxpr(released(shifted))(jnp.arange(3.0)))  # it drops out: left as it is
