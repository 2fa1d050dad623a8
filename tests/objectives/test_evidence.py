"""Evidence against the closed form of linear regression; every bound against the exact value; what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad._jaxpr.labels import check_labels
from hypergrad._solver import evaluation
from hypergrad.objectives._likelihoods import symmetric_root
from tests._helpers import assert_trees_close, central_difference, relative_error, tol

evidence = hg.objectives.evidence
RNG = np.random.default_rng(0)

# Bayesian linear regression with a precision for each of three weights.
X = jnp.asarray(RNG.standard_normal((7, 3)))
Y = X @ jnp.array([1.0, -2.0, 0.3]) + 0.4 * jnp.asarray(RNG.standard_normal(7))
HPARAMS = {"log_precision": jnp.array([0.3, -0.7, 1.1]), "log_noise": jnp.array(-0.6)}
PRIOR = lambda h: jnp.exp(h["log_precision"])
LINEAR = {
    "likelihood": "gaussian",
    "noise": lambda h: jnp.exp(h["log_noise"]),
    "precision": PRIOR,
    "rows": 7,
}


def linear(w, h, x):
    return x @ w


def negative_log_evidence(h):
    """−log N(y; 0, s² I + X P⁻¹ Xᵀ) / n."""
    covariance = jnp.exp(2 * h["log_noise"]) * jnp.eye(7) + (X / jnp.exp(h["log_precision"])[None]) @ X.T
    return 0.5 * (Y @ jnp.linalg.solve(covariance, Y) + jnp.linalg.slogdet(2 * jnp.pi * covariance)[1]) / 7


# Three classes, at random parameters: bounds of the log-determinant need no minimum.
N, C = 6, 3
IMAGES = jnp.asarray(RNG.standard_normal((N, 4)))
LABELS = jnp.asarray([0, 2, 1, 1, 0, 0], jnp.int32)
WEIGHTS = {"w": jnp.asarray(RNG.standard_normal((4, C))), "b": jnp.asarray(RNG.standard_normal(C))}
LAYERS = {"w": jnp.array(-0.4), "b": jnp.array(0.5)}
NETWORK = {"likelihood": "categorical", "precision": lambda h: jax.tree.map(jnp.exp, h), "rows": N}
DATA = (IMAGES, LABELS)
CASES = {form: {"form": form} for form in ("kernel", "full", "block", "kronecker", "diagonal")}
CASES |= {"independent": {"outputs": "independent"}, "partition": {"size": 2, "blocks": 3}}
CASES |= {"grouped": {"size": 2, "blocks": 3, "by_class": True, "outputs": "independent"}}
CASES |= {"pairs": {"size": 2}, "class": {"size": 4, "by_class": True}}
CASES |= {"one": {"size": 4, "outputs": "one"}, "each": {"size": 4, "outputs": "one_each"}}
DRAWN = ("pairs", "class", "one", "each")


def network(w, h, x):
    return jnp.tanh(x) @ w["w"] + w["b"][None]


@pytest.fixture(scope="module")
def complexity():
    """½ log det as the outer loss has it, in every form; for losses that draw, with each of many keys."""

    def value(name, options):
        losses = evidence(network, **NETWORK, **options)
        inner = losses.inner_loss(WEIGHTS, LAYERS, DATA)
        if ("size" not in options and "outputs" not in options) or name == "independent":
            return N * (losses.outer_loss(WEIGHTS, LAYERS, DATA) - inner)
        keys = jax.random.split(jax.random.key(3), 20_000 if name in DRAWN else 5)
        return N * (jax.vmap(lambda key: losses.outer_loss(WEIGHTS, LAYERS, DATA, key))(keys) - inner)

    found = jax.jit(lambda: {name: value(name, options) for name, options in CASES.items()})()
    return {name: np.asarray(values, np.float64) for name, values in found.items()}


@pytest.fixture(scope="module")
def kernel():
    """Λ^½ J P⁻¹ Jᵀ Λ^½ in NumPy, [n c, n c]: the Jacobian of the outputs is that of a linear layer."""
    x, w, b = (np.asarray(leaf, np.float64) for leaf in (jnp.tanh(IMAGES), WEIGHTS["w"], WEIGHTS["b"]))
    p = np.exp(x @ w + b[None])
    p /= p.sum(1, keepdims=True)
    roots = np.zeros((N * C, N * C))
    for i in range(N):
        values, vectors = np.linalg.eigh(np.diag(p[i]) - np.outer(p[i], p[i]))
        block = slice(C * i, C * i + C)
        roots[block, block] = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inputs = x @ x.T / np.exp(float(LAYERS["w"])) + 1 / np.exp(float(LAYERS["b"]))
    return roots @ np.kron(inputs, np.eye(C)) @ roots


def half_log_determinant(kernel, rows):
    index = np.asarray(rows)
    return 0.5 * np.linalg.slogdet(np.eye(len(index)) + kernel[np.ix_(index, index)])[1]


def outputs_of(examples):
    return [C * i + c for i in examples for c in range(C)]


def test_linear_regression_is_the_closed_form_in_value_and_gradient():
    """At the minimum in closed form: through it, and with it held fixed, which is the same here."""
    losses = evidence(linear, **LINEAR)

    def minimum(h):
        precision = X.T @ X * jnp.exp(-2 * h["log_noise"]) + jnp.diag(jnp.exp(h["log_precision"]))
        return jnp.linalg.solve(precision, X.T @ Y) * jnp.exp(-2 * h["log_noise"])

    def both(h):
        through = jax.value_and_grad(lambda h: losses.outer_loss(minimum(h), h, (X, Y)))(h)
        direct = jax.grad(losses.outer_loss, argnums=1)(minimum(h), h, (X, Y))
        slope = jax.grad(losses.inner_loss)(minimum(h), h, (X, Y))
        return through, direct, slope, jax.value_and_grad(negative_log_evidence)(h)

    (value, through), direct, slope, (truth, gradient) = jax.jit(both)(HPARAMS)
    assert relative_error(value, truth) < tol(1e-12, 1e-5)
    assert_trees_close(through, gradient, tol(1e-10, 1e-4))
    assert_trees_close(direct, gradient, tol(1e-10, 1e-4))
    assert np.max(np.abs(slope)) < tol(1e-12, 1e-5)


def test_the_exact_kernel_is_the_reference_from_either_side(complexity, kernel):
    exact = half_log_determinant(kernel, range(N * C))
    assert relative_error(complexity["kernel"], exact) < tol(1e-12, 1e-5)
    assert relative_error(complexity["full"], exact) < tol(1e-12, 1e-5)
    independent = sum(half_log_determinant(kernel, range(c, N * C, C)) for c in range(C))
    assert relative_error(complexity["independent"], independent) < tol(1e-12, 1e-5)


def test_every_bound_is_below_the_evidence(complexity):
    exact = complexity["kernel"]  # what is subtracted from it
    for name in ("block", "diagonal", "independent", "partition", "grouped"):
        assert np.all(complexity[name] > exact * 1.001), name  # whatever the key
    assert exact < complexity["block"] < complexity["diagonal"]  # Fischer, then Hadamard
    for name in DRAWN:  # on average
        assert np.mean(complexity[name]) > exact + 4 * np.std(complexity[name]) / 20_000**0.5, name
    assert 0.5 * exact < complexity["kronecker"] < 2 * exact  # an approximation


def test_blocks_estimate_the_mean_over_all_subsets_which_never_rises_with_their_size(complexity, kernel):
    """Han's inequality, by enumeration; a block of two of six examples is one of these subsets, at random."""
    subsets = [[outputs_of(s) for s in itertools.combinations(range(N), m)] for m in range(1, N + 1)]
    means = [np.mean([half_log_determinant(kernel, s) for s in each]) * N / (i + 1) for i, each in enumerate(subsets)]
    assert np.all(np.diff(means) < 0) and means[-1] == pytest.approx(half_log_determinant(kernel, range(N * C)))
    for name, mean in (("pairs", means[1]),):
        assert abs(np.mean(complexity[name]) - mean) < 4 * np.std(complexity[name]) / 20_000**0.5
    per_output = [C * half_log_determinant(kernel, [C * i + c for i in s]) * N / 4
                  for s in itertools.combinations(range(N), 4) for c in range(C)]  # fmt: skip
    assert abs(np.mean(complexity["one"]) - np.mean(per_output)) < 4 * np.std(complexity["one"]) / 20_000**0.5
    assert np.mean(complexity["class"]) != np.mean(complexity["partition"])


@pytest.mark.parametrize("options", [{"outputs": "independent"}, {"form": "kronecker"}], ids=["independent", "kron"])
def test_the_gradient_in_parameters_and_precisions_is_that_of_the_value(options):
    """Through the symmetric root, and through eigenvalues."""
    small = {"w": WEIGHTS["w"][:2], "b": jnp.zeros(C)}
    loss = evidence(network, likelihood="categorical", precision=jnp.exp, rows=4, **options).outer_loss
    value = jax.jit(lambda w, h: loss(w, h, (IMAGES[:4, :2], LABELS[:4])))
    point = small, jnp.array(0.4)
    found = jax.jit(jax.grad(value, argnums=(0, 1)))(*point)
    if jax.config.read("jax_enable_x64"):
        assert_trees_close(found, central_difference(lambda at: value(*at), point), 1e-8)
    assert np.all(np.isfinite(np.asarray(found[0]["w"])))


def test_the_symmetric_root_is_one_and_its_derivative_knows_the_null_space():
    logits = jnp.array([0.3, -1.2, 2.0])
    matrix = lambda f: jnp.diag(jax.nn.softmax(f)) - jnp.outer(jax.nn.softmax(f), jax.nn.softmax(f))
    of = lambda f: symmetric_root(matrix(f))
    root, square, change, expected = jax.jit(lambda f: (of(f), matrix(f), jax.jacfwd(of)(f), jax.jacfwd(matrix)(f)))(
        logits
    )
    root, change = np.asarray(root), np.asarray(change)
    assert relative_error(root @ root, square) < tol(1e-14, 1e-5)
    np.testing.assert_allclose(root, root.T, atol=tol(1e-15, 1e-6))
    product = np.einsum("ijk,jl->ilk", change, root)
    assert relative_error(product + np.swapaxes(product, 0, 1), expected) < tol(1e-12, 1e-4)


def test_precisions_of_layers_and_parameters_are_those_of_a_scalar_where_they_are_equal():
    precisions = [2.0, {"w": 2.0, "b": 2}, jax.tree.map(lambda w: jnp.full(w.shape, 2.0), WEIGHTS)]
    options = {"likelihood": "categorical", "rows": N, "form": "diagonal"}
    found = jax.jit(
        lambda: [evidence(network, precision=p, **options).outer_loss(WEIGHTS, None, DATA) for p in precisions]
    )()
    np.testing.assert_allclose(found, np.full(3, found[0]), rtol=tol(1e-14, 1e-6))


def test_a_bernoulli_output_is_two_classes():
    logit = lambda w, h, x: x @ w
    two = lambda w, h, x: jnp.stack([jnp.zeros(x.shape[0]), x @ w], axis=1)
    w, labels = jnp.arange(4.0), (LABELS > 0).astype(jnp.int32)

    def losses():
        one = evidence(logit, likelihood="bernoulli", precision=0.7, rows=N)
        other = evidence(two, likelihood="categorical", precision=0.7, rows=N)
        return one.outer_loss(w, None, (IMAGES, labels > 0)), other.outer_loss(w, None, (IMAGES, labels))

    one, other = jax.jit(losses)()
    assert relative_error(one, other) < tol(1e-13, 1e-5)


def test_outputs_are_averages_over_draws_of_the_augmentation(key):
    noisy = lambda x, h, key: hg.augment.gaussian_noise(x, h["noise"], key=key)
    options = {"likelihood": "categorical", "precision": 1.5, "rows": N, "form": "diagonal"}
    losses, single = (evidence(network, **options, augment=noisy, samples=samples) for samples in (3, 1))
    plain = evidence(network, **options)
    at = lambda noise: {"noise": noise}
    value = jax.jit(lambda noise: losses.outer_loss(WEIGHTS, at(noise), DATA, key))

    def compare():
        none = [loss(WEIGHTS, at(0.0), DATA, key) for loss in losses], [loss(WEIGHTS, at(0.0), DATA) for loss in plain]
        seen = noisy(IMAGES, at(0.5), jax.random.split(jax.random.split(key)[0], 1)[0])
        one = single.outer_loss(WEIGHTS, at(0.5), DATA, key), plain.outer_loss(WEIGHTS, at(0.5), (seen, LABELS))
        return none, one, jax.grad(value)(jnp.array(0.5))

    none, one, slope = jax.jit(compare)()
    assert_trees_close(none[0], none[1], tol(1e-12, 1e-5))
    assert relative_error(*one) < tol(1e-12, 1e-5)  # with one draw the outputs are those of the augmented images
    if jax.config.read("jax_enable_x64"):
        assert_trees_close(slope, central_difference(value, jnp.array(0.5)), 1e-8)


def test_a_kernel_that_is_not_symmetric_is_refused_since_its_blocks_are_no_bound(kernel):
    """Λ J P⁻¹ Jᵀ has the determinant of the symmetric kernel, and its blocks sum to less."""
    hessian, gram = np.array([[1.0, -0.9], [-0.9, 1.5]]), np.array([[1.0, 0.9], [0.9, 2.0]])
    exact = np.linalg.slogdet(np.eye(2) + hessian @ gram)[1]
    assert np.sum(np.log1p(np.diag(hessian @ gram))) < exact
    with pytest.raises(hg.InputError, match=r"log_determinant: kernel must be symmetric, .*Λ\^½ J P⁻¹ Jᵀ Λ\^½"):
        hg.objectives.log_determinant(hessian @ gram)
    traced = jax.jit(lambda k: (hg.objectives.log_determinant(k), hg.objectives.log_determinant((k + k.T) / 2)))
    refused, taken = traced(jnp.asarray(hessian @ gram))
    assert np.isnan(refused) and np.isfinite(taken)
    blocks = np.arange(N * C) // C
    found = jax.jit(lambda k: hg.objectives.log_determinant(k, blocks))(jnp.asarray(kernel))
    assert relative_error(found, 2 * sum(half_log_determinant(kernel, outputs_of([i])) for i in range(N))) < tol(
        1e-12, 1e-5
    )


@pytest.mark.parametrize(
    ("kernel", "blocks", "says"),
    [
        (np.ones((2, 3)), None, "must be a square matrix, found shape (2, 3)"),
        (-2 * np.eye(2), None, "must be positive semi-definite"),
        (np.eye(2), [0, 1, 1], "one for each of the 2 rows"),
        (np.eye(2), [0.0, 1.0], "must be concrete integers"),
    ],
)
def test_a_kernel_that_is_none_is_refused(kernel, blocks, says):
    with pytest.raises(hg.InputError, match="log_determinant: ") as error:
        hg.objectives.log_determinant(kernel, blocks)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": -1.0}, "precision must be greater than 0, found -1"),
        ({"precision": {"a": jnp.array([1.0, 0.0])}}, "precision['a'] must be greater than 0, found 0"),
        ({"precision": "weak"}, "precision must be positive numbers, or a function"),
        ({"noise": 0.0}, "noise must be greater than 0, found 0"),
        ({"noise": None}, "noise is the standard deviation of likelihood='gaussian'"),
        ({"likelihood": "categorical"}, "leave noise out"),
        ({"size": 5, "blocks": 2}, "blocks=2 of size=5 need 10 examples, but there are rows=7"),
        ({"blocks": 2}, "leave blocks out"),
        ({"size": 2, "by_class": True}, "by_class=True groups the examples"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, says):
    with pytest.raises((hg.InputError, hg.InputTypeError), match="evidence: ") as error:
        evidence(linear, **{**LINEAR, **changes})
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("changes", "hparams", "batch", "says"),
    [
        ({}, LAYERS, (IMAGES, jax.nn.one_hot(LABELS, C)), "one-hot rows: write jnp.argmax(y, axis=1)"),
        ({}, LAYERS, (IMAGES, LABELS + 1), "targets must be classes from 0 to 2, found 3 in row"),
        ({}, LAYERS, (IMAGES, LABELS.astype(float)), "must be class numbers, integers of shape [6], found float"),
        ({}, LAYERS, (IMAGES[:5], LABELS[:5]), "must see all 6 training examples, found 5"),
        ({}, LAYERS, IMAGES, "must be a pair (x, y)"),
        ({"likelihood": "bernoulli"}, LAYERS, (IMAGES, LABELS.astype(float)), "targets of likelihood='bernoulli'"),
        ({"likelihood": "bernoulli"}, LAYERS, DATA, "must have the shape of the outputs, (6, 3)"),
        ({"precision": lambda h: h}, {"w": -1.0, "b": 1.0}, DATA, "precision['w'] must be greater than 0"),
        ({"precision": 1.0, "model": lambda w, h, x: x[:3]}, None, DATA, "must return floating-point outputs [6, c]"),
        ({"precision": {"w": 1.0}}, None, DATA, "pytree prefix of params, whose leaves are ['b']"),
        ({"precision": np.ones(5)}, None, DATA, "one number for a leaf of params, or one for each entry"),
        ({"size": 3}, LAYERS, (*DATA, DATA), "must be a pair (x, y)"),
    ],
)  # fmt: skip
def test_calls_that_cannot_work_are_refused(changes, hparams, batch, says, key):
    options: dict[str, Any] = {**NETWORK, **changes}
    model: Any = options.pop("model", network)
    losses = evidence(model, **options)
    with pytest.raises((hg.InputError, hg.InputTypeError), match="evidence: ") as error:
        losses.outer_loss(WEIGHTS, hparams, batch, *((key,) if "size" in changes else ()))
    assert says in str(error.value)


def test_traced_precisions_that_are_not_positive_are_nan_and_labels_are_seen_by_the_check_of_tune():
    loss = evidence(network, **{**NETWORK, "precision": lambda h: h}, form="diagonal").outer_loss
    assert np.isnan(jax.jit(loss)(WEIGHTS, {"w": -1.0, "b": 1.0}, DATA))
    for name, labels, classes in (("categorical", LABELS + 1, 3), ("bernoulli", jnp.full((N, C), 2), 2)):
        losses = evidence(network, likelihood=name, precision=1.0, rows=N, form="diagonal")
        with pytest.raises(hg.InputError, match=f"label {classes}|{classes} .*classes"):
            check_labels(losses.inner_loss, WEIGHTS, jnp.zeros(()), (IMAGES, labels), "train")


@pytest.mark.experiment
def test_the_implicit_gradient_is_that_of_the_evidence_and_the_direct_one_is_not(once):
    """Logistic regression: the log-determinant moves with the minimum."""
    losses = evidence(network, **NETWORK)
    problem, inner = hg.Problem(*losses), hg.inner.newton(tol=1e-12)
    implicit, direct = hg.implicit(problem, inner=inner), hg.direct(problem, inner=inner)
    state = implicit.init(WEIGHTS, LAYERS)
    value = jax.jit(lambda h: evaluation(implicit)(state, h, DATA, DATA)[0])
    expected = central_difference(value, LAYERS, 1e-3)
    found, _ = jax.jit(implicit.hypergrad)(state, LAYERS, DATA, DATA)
    assert hg.Status(int(found.info.status)).usable
    assert_trees_close(found.grad, expected, 1e-8)
    other, _ = jax.jit(direct.hypergrad)(direct.init(WEIGHTS, LAYERS), LAYERS, DATA, DATA)
    assert relative_error(other.grad, expected) > 1e-2
