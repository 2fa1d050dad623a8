"""Every convolution of a loop is in the order that XLA has a fast routine for, with the values it had.

Counted in lowered programs: XLA on CPU calls its library for a convolution of this order, wherever it stands.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export, lax

import hypergrad as hg
from hypergrad._jaxpr.convolutions import fast_convolutions

CONVOLUTION = re.compile(r"convolution\(.*?dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])")
FAST = {
    "[b, 0, f]x[0, i, o]->[b, 0, f]",
    "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]",
    "[b, 0, 1, 2, f]x[0, 1, 2, i, o]->[b, 0, 1, 2, f]",
}


def slow(text):
    """How many convolutions of a lowered program are in another order, and how many there are."""
    found = CONVOLUTION.findall(text)
    return sum(order not in FAST for order in found), len(found)


KINDS = {  # x, kernel, and how they are convolved
    "features last": ((3, 8, 8, 2), (3, 3, 2, 4), {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}),
    "features first": ((3, 2, 8, 8), (4, 2, 3, 3), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
    "strided": ((3, 8, 8, 2), (3, 3, 2, 4), {"window_strides": (2, 2), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}),
    "dilated": ((3, 2, 8, 8), (4, 2, 3, 3), {"rhs_dilation": (2, 1)}),
    "transposed": ((3, 2, 4, 4), (4, 2, 3, 3), {"padding": ((1, 2), (1, 2)), "lhs_dilation": (2, 2)}),
    "in groups": (
        (3, 8, 8, 4),
        (3, 3, 1, 4),
        {"feature_group_count": 4, "dimension_numbers": ("NHWC", "HWIO", "NHWC")},
    ),
    "of a line": ((3, 2, 9), (4, 2, 3), {}),
    "of a volume": ((2, 2, 4, 4, 4), (3, 2, 2, 2, 2), {}),
}


def pair(kind):
    x_shape, kernel_shape, options = KINDS[kind]
    rng = np.random.default_rng(0)
    options = {"window_strides": (1,) * (len(x_shape) - 2), "padding": "SAME"} | options
    convolve = lambda x, kernel: jnp.sum(jnp.tanh(lax.conv_general_dilated(x, kernel, **options)) ** 2)
    return convolve, jnp.asarray(rng.normal(size=x_shape)), jnp.asarray(rng.normal(size=kernel_shape) / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_every_convolution_are_fast_in_a_loop_and_keep_their_values(kind):
    convolve, x, kernel = pair(kind)
    gradient = jax.grad(convolve, argnums=(0, 1))

    def step(at):
        first, second = jax.jvp(gradient, at, at)  # a product with the Hessian
        return jax.tree.map(lambda w, a, b: w - 0.01 * a - 0.001 * b, at, first, second)

    loop = lambda at: lax.fori_loop(0, 2, lambda i, at: step(at), at)
    rewritten, given = (jax.jit(f).lower((x, kernel)) for f in (fast_convolutions(loop), loop))
    number, (left, total) = slow(given.as_text()), slow(rewritten.as_text())
    assert number[0] > 0 and left == 0 and total == number[1]
    once = jax.jit(step)
    expected = once(once((x, kernel)))
    for a, b in zip(rewritten.compile()((x, kernel)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4 * float(jnp.finfo(b.dtype).eps) * float(jnp.max(jnp.abs(b))))


def test_other_platforms_keep_their_program():
    convolve, x, kernel = pair("features first")
    loop = lambda kernel: lax.fori_loop(0, 2, lambda i, k: k - jax.grad(convolve, argnums=1)(x, k), kernel)
    texts = {
        (name, platform): export.export(jax.jit(f), platforms=[platform])(kernel).mlir_module()
        for name, f in (("fast", fast_convolutions(loop)), ("given", loop))
        for platform in ("cpu", "cuda", "tpu")
    }
    for platform in ("cuda", "tpu"):
        assert CONVOLUTION.findall(texts["fast", platform]) == CONVOLUTION.findall(texts["given", platform])
        assert slow(texts["fast", platform])[0] > 0
    assert slow(texts["fast", "cpu"])[0] == 0


def test_branches_checkpoints_and_rules_of_their_own_are_entered():
    convolve, x, kernel = pair("features first")

    @jax.custom_jvp
    def doubled(kernel):
        return 2 * convolve(x, kernel)

    doubled.defjvp(lambda at, along: (doubled(*at), 3 * jnp.sum(along[0])))  # on purpose not the derivative

    def function(kernel):
        branch = lax.cond(kernel[0, 0, 0, 0] > 0, lambda k: convolve(x, k), lambda k: jnp.sum(k), kernel)
        mapped = jnp.sum(lax.map(jax.checkpoint(lambda i: i * convolve(x, kernel)), jnp.arange(3.0)))
        return branch + mapped + doubled(kernel)

    fast = fast_convolutions(function)
    text = jax.jit(fast).lower(kernel).as_text()
    assert slow(text)[0] == 0 and slow(text)[1] >= 3
    np.testing.assert_allclose(jax.jit(fast)(kernel), jax.jit(function)(kernel), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(fast))(kernel), jax.jit(jax.grad(function))(kernel), rtol=1e-4)


def test_nothing_is_rewritten_outside_of_a_trace_or_in_a_platforms_own_branch():
    convolve, x, kernel = pair("features first")
    assert float(fast_convolutions(convolve)(x, kernel)) == float(convolve(x, kernel))
    chosen = lambda x, kernel: lax.platform_dependent(x, kernel, cpu=convolve, default=convolve)
    assert slow(jax.jit(fast_convolutions(chosen)).lower(x, kernel).as_text()) == (1, 1)


def network():
    """A small network with convolutions and pooling."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(6, 8, 8, 1))), jnp.asarray(rng.integers(0, 3, 6))
    params = {"a": jnp.asarray(rng.normal(size=(3, 3, 1, 4)) / 3), "b": jnp.asarray(rng.normal(size=(3, 3, 4, 3)) / 6)}
    convolve = lambda x, kernel: lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    def error(params, l2, batch):
        hidden = jax.nn.relu(convolve(x, params["a"]))
        hidden = lax.reduce_window(hidden, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        logits = convolve(hidden, params["b"]).mean((1, 2))
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1))

    inner_loss = lambda params, l2, batch: (
        error(params, l2, batch) + jnp.exp(l2) * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
    )
    return hg.Problem(inner_loss, error), params


ADAM = optax.adam(1e-2)
METHODS = {
    "unrolled": lambda problem: hg.unrolled(problem, inner=hg.inner.gradient(ADAM, steps=8)),
    "online": lambda problem: hg.online(problem, ADAM, steps=8),
}


@pytest.mark.parametrize("name", METHODS)
def test_no_loop_of_a_method_convolves_slowly(name):
    problem, params = network()
    solver = METHODS[name](problem)
    state = solver.init(params, -4.0)
    for function in (solver.hypergrad, solver.evaluate):
        left, total = slow(jax.jit(function).lower(state, jnp.asarray(-4.0)).as_text())
        assert left == 0 and total >= 5, "two convolutions forward, three back"


def test_eight_steps_of_training_in_a_loop_are_those_of_eight_calls():
    problem, params = network()
    solver = METHODS["online"](problem)
    hparams = jnp.asarray(-4.0)
    _, _, state = jax.jit(solver.evaluate)(solver.init(params, hparams), hparams)

    @jax.jit
    def step(params, carried):
        grads = jax.grad(problem.inner_loss)(params, hparams, None)
        updates, carried = ADAM.update(grads, carried)
        return optax.apply_updates(params, updates), carried

    carried = ADAM.init(params)
    for _ in range(8):
        params, carried = step(params, carried)
    bound = 1e-12 if hparams.dtype == jnp.float64 else 1e-5
    for found, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(found, expected, rtol=bound, atol=bound)
