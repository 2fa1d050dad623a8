"""Exponents against the tables of the papers, by hand; what they do to training against hand-scaled optimizers; and the
coordinate check, which is flat with them and is not without.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.diagnostics import plots
from tests._helpers import flat, relative_error, tol

SCALING = hg.scaling
X, Y = (np.random.default_rng(0).normal(size=(12, k)) for k in (5, 3))


def mlp(width: int, key: Any, wide: int | None = None) -> Any:
    """Three layers, each drawn as LeCun would."""
    wide = width if wide is None else wide
    keys = jax.random.split(key, 3)
    weight = lambda key, n, m: jax.random.normal(key, (n, m)) / n**0.5
    return {
        "in": {"w": weight(keys[0], 5, width), "b": jnp.zeros(width)},
        "hidden": {"w": weight(keys[1], width, wide), "b": jnp.zeros(wide)},
        "out": {"w": weight(keys[2], wide, 3), "b": jnp.zeros(3)},
    }


def forward(w: Any, x: Any) -> dict[str, Any]:
    first = jnp.tanh(x @ w["in"]["w"] + w["in"]["b"][None])
    second = jnp.tanh(first @ w["hidden"]["w"] + w["hidden"]["b"][None])
    return {"first": first, "second": second, "logits": second @ w["out"]["w"] + w["out"]["b"][None]}


def loss(w: Any, batch: Any) -> Any:
    return jnp.mean((forward(w, batch[0])["logits"] - batch[1]) ** 2)


KEY = jax.random.key(3)
BATCH = (jnp.asarray(X), jnp.asarray(Y))
TUNED, WIDER = mlp(8, KEY), mlp(16, KEY)


def shapes(**sizes: Any) -> Any:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}


def network(n: int) -> Any:
    """A convolutional network: filters, a channel-wise filter, normalization, a readout."""
    return shapes(first=(3, 3, 1, n), second=(3, 3, n, 2 * n), apart=(3, 3, 1, 2 * n), gain=(2 * n,), out=(2 * n, 10))


def attention(n: int) -> Any:
    """A block of a transformer as flax shapes it, whose heads grow in number."""
    heads = n // 4
    return shapes(
        embed=(27, n),
        place=(16, n),
        query=(n, heads, 4),
        query_bias=(heads, 4),
        mix=(heads, 4, n),
        gain=(n,),
        up=(n, 4 * n),
        down=(4 * n, n),
        out=(n, 27),
        out_bias=(27,),
    )


VECTOR = {"initial": 0, "adam": 0, "sgd": 1, "multiplier": 0}
HIDDEN = {"initial": -0.5, "adam": -1, "sgd": 0, "multiplier": 0}
OUTPUT = {"initial": -1, "adam": -1, "sgd": -1, "multiplier": 0}  # Table 3
READOUT = {"initial": 0, "adam": 0, "sgd": 1, "multiplier": -1}  # Table 8
SCALAR = {"initial": 0, "adam": 0, "sgd": 0, "multiplier": 0}
MODELS = {
    "convolutions": (
        network,
        "in_out",
        {"first": VECTOR, "second": HIDDEN, "apart": VECTOR, "gain": VECTOR, "out": OUTPUT},
    ),
    "attention": (
        attention,
        {name: "oo" if name == "query_bias" else "in_out" for name in attention(8)},
        dict.fromkeys(("embed", "place", "gain", "query_bias"), VECTOR)
        | dict.fromkeys(("query", "mix", "up", "down"), HIDDEN)
        | {"out": OUTPUT, "out_bias": SCALAR},
    ),
}


@pytest.mark.parametrize("form", ["weights", "multiplier"])
@pytest.mark.parametrize("name", MODELS)
def test_exponents_are_those_of_the_tables(name, form):
    model, layout, expected = MODELS[name]
    for rule in ("adam", "sgd"):
        found = SCALING.infer(model(8), model(24), rule=rule, form=form, layout=layout).leaves
        for leaf, powers in expected.items():
            powers = READOUT if powers is OUTPUT and form == "multiplier" else powers
            at = found[f"['{leaf}']"]
            assert at.initial.width == powers["initial"], leaf
            assert at.rate.width == powers[rule], (leaf, rule)
            assert at.multiplier.width == powers["multiplier"], leaf
            assert at.decay.width == -powers[rule], leaf


def test_decays_of_adamw_are_the_square_root_on_hidden_leaves_and_none_elsewhere():
    scaling = SCALING.infer(TUNED, WIDER, rule="adam", decay="sqrt")
    decays = SCALING.factors(scaling, mlp(128, KEY)).decay
    assert decays == {"in": {"w": 0, "b": 0}, "hidden": {"w": 4, "b": 0}, "out": {"w": 0, "b": 0}}
    assert {leaf.decay for leaf in SCALING.infer(TUNED, WIDER, rule="sgd", decay="fixed").leaves.values()} == {
        (0, 0, 0)
    }
    assert "['hidden']['w']  hidden  m^-0.5   m^-1         1           m^0.5" in str(scaling)


def test_widths_that_grow_apart_count_each_for_itself():
    scaling = SCALING.infer(TUNED, WIDER, rule="sgd")
    model = mlp(16, KEY, wide=32)  # fan-in twice, fan-out four times the tuned one
    by = SCALING.factors(scaling, model)
    assert by.rate["hidden"] == {"w": 2, "b": 4}
    assert by.rate["in"] == {"w": 2, "b": 2}
    assert by.rate["out"] == {"w": 0.25, "b": 1}
    assert by.initial["hidden"]["w"] == 2**-0.5
    assert by.gradient["hidden"] == {"w": 0.25, "b": 0.25}
    adam = SCALING.factors(SCALING.infer(TUNED, WIDER, rule="adam"), model).rate
    assert adam["hidden"] == {"w": 0.5, "b": 1} and adam["out"]["w"] == 0.25


def test_rates_of_residual_branches_follow_the_depth():
    """Adam: M^(α-1), which is 1 for CompleteP; SGD besides by the gradients' M^-α."""
    depth = {"in": 1.0, "hidden": 9.0, "out": 1.0}
    for alpha, adam, sgd in ((1.0, 1, 9), (0.5, 1 / 3, 1)):
        for rule, factor in (("adam", adam), ("sgd", sgd)):
            found = SCALING.infer(TUNED, WIDER, rule=rule, depth=depth, alpha=alpha)
            rate = SCALING.factors(found, TUNED).rate
            assert rate["hidden"]["w"] == pytest.approx(factor) and rate["hidden"]["b"] == pytest.approx(factor)
            assert rate["in"] == {"w": 1, "b": 1} and rate["out"] == {"w": 1, "b": 1}
    stacked = lambda n, layers: shapes(blocks=(layers, n, n), shift=(layers, n), out=(n, 2))
    depth = {"blocks": "stacked", "shift": "stacked", "out": 1.0}
    for layout, blocks in (("in_out", "hidden"), ({"blocks": "out_in", "shift": "out_in", "out": "io"}, "hidden")):
        found = SCALING.infer(stacked(4, 2), stacked(8, 6), rule="sgd", depth=depth, layout=layout)
        assert [leaf.kind for leaf in found.leaves.values()] == [blocks, "output", "vector"]
        assert SCALING.factors(found, stacked(12, 8)).rate == {"blocks": 4, "shift": 12, "out": pytest.approx(1 / 3)}


def test_models_of_flax_and_equinox_are_read_as_they_are():
    eqx, linen, nnx = (pytest.importorskip(name) for name in ("equinox", "flax.linen", "flax.nnx"))

    class Net(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            x = linen.LayerNorm()(linen.Conv(self.width, (3, 3))(x))
            x = linen.Dense(2 * self.width)(linen.relu(x).mean((0, 1)))
            return linen.Dense(4)(x)

    def of_nnx(n):
        net = nnx.Sequential(nnx.Linear(3, n, rngs=nnx.Rngs(0)), nnx.Linear(n, n, rngs=nnx.Rngs(1)))
        return nnx.state(net, nnx.Param)

    models = {
        "linen": (lambda n: Net(n).init(jax.random.key(0), jnp.ones((6, 6, 2)))["params"], "in_out"),
        "nnx": (of_nnx, "in_out"),
        "eqx": (lambda n: eqx.filter(eqx.nn.MLP(3, 2, n, 2, key=jax.random.key(0)), eqx.is_inexact_array), "out_in"),
    }
    kinds = {}
    for name, (model, layout) in models.items():
        tuned, wider, wide = (eqx.filter_eval_shape(model, n) for n in (4, 8, 16))
        found = SCALING.infer(tuned, wider, rule="adam", layout=layout)
        kinds[name] = [leaf.kind for leaf in found.leaves.values()]
        rates = SCALING.factors(found, wide).rate
        assert jax.tree.structure(rates) == jax.tree.structure(wide)
        assert jax.tree.leaves(rates) == [0.25 if kind in ("hidden", "output") else 1 for kind in kinds[name]]
    assert kinds["linen"] == ["vector", "input", "vector", "hidden", "scalar", "output", "vector", "vector"]
    assert kinds["nnx"] == ["vector", "input", "vector", "hidden"]
    assert kinds["eqx"] == ["input", "vector", "hidden", "vector", "output", "scalar"]


def trained(optimizer: Any, params: Any, steps: int = 3, loss: Any = loss) -> Any:
    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(params, BATCH), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


NAMES = {part: {leaf: f"{part}.{leaf}" for leaf in ("w", "b")} for part in ("in", "hidden", "out")}
M = 4.0  # of a model of width 32
ADAM = {"hidden.w": (1 / M, M), "out.w": (1 / M, M)}  # of rate and decay
SGD = {"in.w": (M, 1 / M), "in.b": (M, 1 / M), "hidden.b": (M, 1 / M), "out.w": (1 / M, M)}


@pytest.mark.parametrize(
    ("rule", "made", "by_hand"),
    [("adam", lambda rate, decay: optax.adamw(rate, weight_decay=decay), ADAM),
     ("sgd", lambda rate, decay: optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9)), SGD)],
    ids=["adamw", "sgd with momentum"],
)  # fmt: skip
def test_scaled_is_the_optimizer_with_rates_and_decays_by_hand(rule, made, by_hand):
    each = {
        name: made(*(0.02 * np.array(by_hand.get(name, (1, 1))))) for part in NAMES.values() for name in part.values()
    }
    params = mlp(32, KEY)
    scaling = SCALING.infer(TUNED, WIDER, rule=rule)
    found = trained(SCALING.scaled(scaling, made(0.02, 0.02)), params)
    assert relative_error(found, trained(optax.multi_transform(each, NAMES), params)) < tol(1e-13, 1e-5)
    assert relative_error(found, trained(made(0.02, 0.02), params)) > 1e-3


def test_at_the_tuned_width_nothing_changes_to_the_bit():
    scaling = SCALING.infer(TUNED, WIDER, rule="adam")
    np.testing.assert_array_equal(flat(SCALING.rescale(scaling, TUNED)), flat(TUNED))
    np.testing.assert_array_equal(flat(SCALING.multiply(scaling, TUNED)), flat(TUNED))
    optimizer = optax.adamw(0.02, weight_decay=0.1)
    np.testing.assert_array_equal(
        flat(trained(SCALING.scaled(scaling, optimizer, gradients=True), TUNED)), flat(trained(optimizer, TUNED))
    )


def test_scaled_gradients_give_eps_its_meaning_back():
    wide, tuned, eps = {"w": jnp.full((16, 16), 1e-3 / 4)}, {"w": jnp.full((4, 4), 1e-3)}, 1e-3
    scaling = SCALING.infer(tuned, {"w": jnp.ones((8, 8))}, rule="adam")
    for gradients, expected in ((True, -0.5 / 4), (False, -0.2 / 4)):
        optimizer = SCALING.scaled(scaling, optax.adam(1.0, eps=eps), gradients=gradients)
        np.testing.assert_allclose(optimizer.update(wide, optimizer.init(wide))[0]["w"], expected, rtol=1e-5)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_weights_and_multipliers_are_one_model(rule):
    """Tables 3 and 8 are the same function at every step (Lemma J.1 of the paper); not so without the multiplier."""
    optimizer = {"adam": optax.adam(0.01, eps=1e-30), "sgd": optax.sgd(0.05)}[rule]
    outputs, shift = [], lambda w: w | {"out": w["out"] | {"b": w["out"]["b"] + 0.1}}
    for form in ("weights", "multiplier"):
        scaling = SCALING.infer(TUNED, WIDER, rule=rule, form=form)
        params = SCALING.rescale(scaling, shift(mlp(32, KEY)))
        model = lambda w, scaling=scaling: SCALING.multiply(scaling, w)
        fitted = trained(SCALING.scaled(scaling, optimizer), params, loss=lambda w, b, model=model: loss(model(w), b))
        outputs.append(forward(model(fitted), BATCH[0])["logits"])
        if form == "multiplier":
            assert relative_error(forward(fitted, BATCH[0])["logits"], outputs[0]) > 0.1
    assert relative_error(outputs[1], outputs[0]) < tol(1e-12, 1e-4)


def test_initial_sizes_are_right_whatever_initializer_drew_them():
    scaling = SCALING.infer(TUNED, WIDER, rule="adam")
    size = lambda x: float(jnp.sqrt(jnp.mean(x**2)))
    lecun = mlp(128, KEY)
    constant = jax.tree.map(lambda x: 0.02 * x / jnp.maximum(jnp.std(x), 1e-9), lecun)
    for drawn in (lecun, constant, jax.jit(lambda: constant)()):
        found = SCALING.rescale(scaling, drawn)
        for part, factor in (("in", 1), ("hidden", 0.25), ("out", 1 / 16)):
            assert size(found[part]["w"]) == pytest.approx(factor * size(TUNED[part]["w"]), rel=1e-5)
            assert not np.any(found[part]["b"])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lecun)
    assert {x.dtype for x in jax.tree.leaves(SCALING.rescale(scaling, half))} == {jnp.dtype(jnp.bfloat16)}


def test_hypergradients_of_rate_and_decay_are_those_of_differences():
    """The tuned hyperparameters are traced, and the same number at every width."""
    model = lambda n: {"in": TUNED["in"]["w"][:, jnp.arange(n) % 8], "hidden": jnp.eye(n), "out": jnp.ones((n, 3)) / n}
    layout = {"in": "io", "hidden": "io", "out": "io"}
    scaling = SCALING.infer(model(8), model(16), rule="adam", decay="sqrt", layout=layout)
    made = lambda h: SCALING.scaled(scaling, optax.adamw(h["rate"], weight_decay=h["decay"]))
    fit = lambda w, h, b: jnp.mean((jnp.tanh(b[0] @ w["in"] @ w["hidden"]) @ w["out"] - b[1]) ** 2)
    problem = hg.Problem(fit, fit)
    with jax.enable_x64(True):  # differences need float64 in either run
        params, batch = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (model(16), BATCH))
        h = {"rate": jnp.asarray(0.02), "decay": jnp.asarray(0.3)}
        solver = hg.unrolled(problem, inner=hg.inner.gradient(made, steps=3), mode="forward")
        run = jax.jit(lambda h: solver.hypergrad(solver.init(params, h), h, batch, batch)[0])
        out = run(h)
        for name in h:
            values = [run(h | {name: h[name] + step}).value for step in (1e-5, -1e-5)]
            np.testing.assert_allclose(out.grad[name], (values[0] - values[1]) / 2e-5, rtol=1e-6)
        assert abs(out.grad["decay"]) > 1e-5


WIDTHS = (64, 512)


def coordinates(rule: str, *, with_rules: bool) -> Any:
    scaling = SCALING.infer(TUNED, WIDER, rule=rule)
    optimizer = {"adam": optax.adam(1e-4), "sgd": optax.sgd(0.005)}[rule]
    init = lambda n, key: SCALING.rescale(scaling, mlp(n, key)) if with_rules else mlp(n, key)
    return SCALING.coordinate_check(
        init,
        loss,
        lambda w, b: forward(w, b[0]),
        SCALING.scaled(scaling, optimizer) if with_rules else optimizer,
        BATCH,
        widths=WIDTHS,
        key=jax.random.key(1),
        steps=2,
        repeats=16,
    )


@pytest.fixture(scope="module")
def checks() -> dict[tuple[str, bool], Any]:
    return {(rule, rules): coordinates(rule, with_rules=rules) for rule in ("adam", "sgd") for rules in (True, False)}


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_the_coordinate_check_is_flat_with_the_rules_and_is_not_without(checks, rule):
    with_rules, without = checks[rule, True], checks[rule, False]
    assert with_rules.change["logits"].shape == (2, 2)
    assert all(abs(slope) < 0.12 for slope in with_rules.slopes.values()), with_rules.slopes
    theory = {"adam": {"first": 0, "second": 1, "logits": 1.5}, "sgd": {"first": -0.5, "second": 0.5, "logits": 1}}
    for name, slope in theory[rule].items():  # of the first step from LeCun's weights
        assert abs(without.slopes[name] - slope) < 0.25, without.slopes


def test_the_plot_of_a_coordinate_check_has_a_line_for_each_activation(checks):
    ax = plots.coordinates(checks["adam", True])
    lines = ax.get_lines()
    assert len(lines) == 6 and ax.get_xscale() == "log" and ax.get_yscale() == "log"
    np.testing.assert_array_equal(lines[1].get_ydata(), checks["adam", True].change["first"][-1])
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == [f"{name}: width^{slope:.2f}" for name, slope in checks["adam", True].slopes.items()]
    with pytest.raises(hg.InputError, match=r"plots: expected what hg\.scaling\.coordinate_check returns, found int"):
        plots.coordinates(3)
    import matplotlib.pyplot as plt

    plt.close("all")


def test_residual_branches_move_as_much_at_every_depth():
    """The same check over depths: with branches divided by the depth, SGD's rate grows with it."""
    width = 32
    draw = lambda layers, key: {
        "blocks": jax.random.normal(key, (layers, width, width)) / width**0.5,
        "out": jax.random.normal(key, (width, 3)) / width,
    }

    def activations(w: Any, b: Any) -> Any:
        start = jnp.tile(b[0], (1, 7))[:, :width]
        block = lambda x, v: (x + jnp.tanh(x @ v) / len(w["blocks"]), None)
        x = jax.lax.scan(block, start, w["blocks"])[0]
        return {"features": x, "logits": x @ w["out"]}

    fit = lambda w, b: jnp.mean((activations(w, b)["logits"] - b[1]) ** 2)
    slopes = []
    for depth in ({"blocks": "stacked", "out": 1.0}, None):
        tuned = draw(8, KEY)
        wider = jax.eval_shape(lambda: {"blocks": jnp.ones((8, 64, 64)), "out": jnp.ones((64, 3))})
        scaling = SCALING.infer(tuned, wider, rule="sgd", depth=depth)
        optimizer = SCALING.scaled(scaling, optax.sgd(0.5)) if depth else optax.sgd(0.5)
        check = SCALING.coordinate_check(
            draw, fit, activations, optimizer, BATCH, widths=(8, 64), key=KEY, steps=2, repeats=2
        )
        slopes.append(check.slopes["features"])
    assert abs(slopes[0]) < 0.15 and slopes[1] < -0.6, slopes


def test_what_cannot_be_read_is_refused():
    def refused(message: str, *models: Any, error: Any = hg.InputError, **changes: Any) -> None:
        with pytest.raises(error, match=message):
            SCALING.infer(*models, **({"rule": "adam"} | changes))

    square = lambda *shape: {"w": jnp.arange(float(np.prod(shape))).reshape(shape)}
    refused(
        r"wider must have the leaves of tuned, found \['b'\], which is in one",
        square(2, 2),
        square(4, 4) | {"b": jnp.ones(2)},
    )
    refused("wider must have the leaves of tuned, found .*out", TUNED, {k: v for k, v in WIDER.items() if k != "out"})
    refused(r"wider\['w'\] must have the 2 axes of tuned, found shape \(4,\)", square(2, 2), square(4))
    refused("must not be smaller than tuned along any axis, found 8 for 16 along axis", WIDER, TUNED)
    refused("all shapes of tuned and wider must not be equal", TUNED, TUNED)
    refused("3 that grow in .* for axis 0: write a letter .* or depth='stacked'", square(2, 4, 4), square(3, 8, 8))
    refused("1 that grow in .*has none for axis 0", square(2, 4, 4), square(3, 4, 4))
    refused("'out_in' has none for axis 2", square(2, 4, 4), square(2, 8, 8), layout="out_in")
    refused("layout must be 'in_out', 'out_in', or a letter", square(2, 2), square(4, 4), layout="ioo")
    refused("layout must be .* found 'inout'", square(2, 2), square(4, 4), layout="inout")
    refused(
        "layout must have i or o for every growing axis, found '.' for axis 1", square(2, 2), square(4, 4), layout="i."
    )
    refused("layout must be one value or a pytree prefix of tuned", TUNED, WIDER, layout={"in": "in_out"})
    refused("depth must be a ratio above 0 or 'stacked', found -1", square(2, 2), square(4, 4), depth=-1)
    refused("decay must be 'inverse_rate' or 'fixed' with rule='sgd'", TUNED, WIDER, rule="sgd", decay="sqrt")
    refused(r"tuned\['n'\] must be a floating-point array, found int", {"n": 3}, {"n": 3}, error=hg.InputTypeError)
    refused("must not be empty", square(0, 2), square(0, 4))
    refused("tuned must have leaves", {}, {})
    zeros = lambda n: {"bias": jnp.zeros((n, 4))}
    refused("layout must say what .*write 'io' for an output layer .* 'oo' for a bias", zeros(2), zeros(4))
    assert SCALING.infer(zeros(2), zeros(4), rule="adam", layout="oo").leaves["['bias']"].kind == "vector"
    assert SCALING.infer(zeros(2), zeros(4), rule="adam", layout="io").leaves["['bias']"].kind == "output"


def test_another_model_is_refused_where_a_scaling_is_used():
    scaling = SCALING.infer(TUNED, WIDER, rule="adam")
    for use, name in (
        (SCALING.rescale, "rescale"),
        (SCALING.factors, "factors"),
        (lambda scaling, w: SCALING.scaled(scaling, optax.sgd(0.1)).init(w), "scaled"),
    ):
        with pytest.raises(hg.InputError, match=f"{name}: params must have the leaves .* found .*'out'.* missing"):
            use(scaling, {k: v for k, v in WIDER.items() if k != "out"})
        with pytest.raises(hg.InputError, match=f"{name}: params must have the leaves .* found .*'new'.* besides"):
            use(scaling, WIDER | {"new": jnp.ones(2)})
        with pytest.raises(hg.InputError, match=rf"{name}: params.*'in'.*'w'.* must have the tuned shape \(5, 8\)"):
            use(scaling, WIDER | {"in": {"w": jnp.ones((6, 16)), "b": jnp.ones(16)}})
    shapes_alone = SCALING.infer(*jax.eval_shape(lambda: (TUNED, WIDER)), rule="adam")
    with pytest.raises(hg.InputError, match="rescale: scaling must be inferred from parameters with values"):
        SCALING.rescale(shapes_alone, WIDER)
    with pytest.raises(hg.InputError, match="coordinate_check: widths must be at least two different ones"):
        SCALING.coordinate_check(mlp, loss, forward, optax.sgd(0.1), BATCH, widths=(8, 8), key=KEY)
