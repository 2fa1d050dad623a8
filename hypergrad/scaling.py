r"""Tune a narrow model, train a wide one: how initial sizes, learning rates and decays follow width and depth.

With m the width of a model over that of the one which was tuned, and M the same of its depth, a leaf of the parameters

                                  initial size   update   gradient   multiplier
    input, bias, gain  (m out)         1           1        1/m          1
    hidden             (m in, m out)   m^-1/2      1/m      1/m          1
    output             (m in)          1/m         1/m      1            1         form="weights"
                                       1           1        1/m          1/m       form="multiplier"
    neither                            1           1        1            1
    inside of a residual branch, times 1           M^(α-1)  M^-α         M^-α, by the model

has entries of this initial standard deviation, should move by this much a step, and has gradients of this size. What
follows is maximal update: every layer's features move by the same amount at every width. Learning rates are update for
optimizers that normalize gradients entry by entry (Adam), update/gradient for those that do not (SGD). Where m in and m
out differ, the gradient of a hidden leaf is 1/(m out), and the rest follows m in.

Decays, relative to the tuned one and multiplied by the learning rate as AdamW does: 1/rate keeps what decay does over a
run ("inverse_rate"); √m on hidden leaves and none elsewhere ("sqrt") keeps the largest singular values of AdamW.

Source: Yang et al. 2022, Tensor Programs V, arXiv:2203.03466, Tables 3 ("weights") and 8 ("multiplier"), Appendix B
(SGD at unequal widths); Dey et al. 2025 (CompleteP, α = 1), arXiv:2505.01618, and Bordelon et al. 2023,
arXiv:2309.16620 (SGD over depth); Fan et al. 2025, arXiv:2510.15262 ("sqrt"). Differs: kinds are read off the shapes
of two instances; initial sizes are relative to those measured at the tuned width, so that any initializer will do.
Cost: one multiplication for each parameter a step; two where decays move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from hypergrad import _tree
from hypergrad._options import Choice, Number, Slot, options
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree, keystr
from hypergrad.inner.gradient import OPTIMIZER


class Power(NamedTuple):
    """A factor `fan_in^a · fan_out^b · depth^c` of the ratios to the tuned model.

    Attributes:
        fan_in: exponent of the ratio of what a leaf sums over.
        fan_out: exponent of the ratio of what it produces.
        depth: exponent of the ratio of depths.
    """

    fan_in: float = 0.0
    fan_out: float = 0.0
    depth: float = 0.0

    @property
    def width(self) -> float:
        """The exponent where all widths grow alike."""
        return self.fan_in + self.fan_out

    def __call__(self, fan_in: float, fan_out: float, depth: float) -> float:
        """The factor."""
        return fan_in**self.fan_in * fan_out**self.fan_out * depth**self.depth


class Leaf(NamedTuple):
    """What is known of one leaf; made by `hg.scaling.infer`.

    Attributes:
        kind: `"hidden"`, `"input"`, `"output"`, `"vector"` (biases and gains), or `"scalar"`, which does not grow.
        shape: in the model that was tuned.
        fan_in: axes that grow and are summed over.
        fan_out: axes that grow otherwise.
        stacked: whether the first axis counts layers.
        depth: ratio of depths, where `stacked` does not give it.
        initial: exponents of the initial standard deviation.
        rate: of the learning rate.
        multiplier: of what the leaf is multiplied by in the forward pass.
        decay: of the decay, or None for a leaf that is not decayed.
        gradient: of the gradient's entries.
        size: root mean square of the entries in the model that was tuned; None if only shapes are known.
    """

    kind: str
    shape: tuple[int, ...]
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    stacked: bool
    depth: float
    initial: Power
    rate: Power
    multiplier: Power
    decay: Power | None
    gradient: Power
    size: float | None


class Scaling(NamedTuple):
    """How each leaf of a model follows its width; made by `hg.scaling.infer`. Printed, it is a table.

    Attributes:
        leaves: a `Leaf` for each path, such as `"['layer']['w']"`.
        rule: `"adam"` or `"sgd"`.
    """

    leaves: Mapping[str, Leaf]
    rule: str

    def __str__(self) -> str:
        rows = [["leaf", "kind", "initial", f"rate ({self.rule})", "multiplier", "decay"]]
        for path, leaf in self.leaves.items():
            powers = [_shown(power) for power in (leaf.initial, leaf.rate, leaf.multiplier, leaf.decay)]
            rows.append([path, leaf.kind, *powers])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class Factors(NamedTuple):
    """Numbers relative to the model that was tuned, each a pytree like the parameters; see `hg.scaling.factors`.

    Attributes:
        initial: of the initial standard deviation.
        rate: of the learning rate.
        multiplier: of the leaf in the forward pass.
        decay: of the decay; 0 for a leaf that is not decayed.
        gradient: of the gradient's entries.
    """

    initial: PyTree
    rate: PyTree
    multiplier: PyTree
    decay: PyTree
    gradient: PyTree


class CoordinateCheck(NamedTuple):
    """Sizes over widths; made by `hg.scaling.coordinate_check`, drawn by `hg.diagnostics.plots.coordinates`.

    Attributes:
        widths: `[widths]`.
        start: root mean square of each activation before training, `[widths]` by name.
        change: root mean square of what training has changed after each step, `[steps, widths]` by name.
    """

    widths: np.ndarray
    start: dict[str, np.ndarray]
    change: dict[str, np.ndarray]

    @property
    def slopes(self) -> dict[str, float]:
        """By name: the exponent of the last step's change over width, by least squares; NaN where one is not finite."""
        return {name: _slope(self.widths, rows[-1]) for name, rows in self.change.items()}


@options(
    rule=Choice(("adam", "sgd")),
    form=Choice(("weights", "multiplier")),
    decay=Choice(("inverse_rate", "sqrt", "fixed")),
    alpha=Number(least=0.5, most=1, static=True, advice="1 is CompleteP's, 0.5 the other end of what is in use"),
)
def infer(
    tuned: PyTree,
    wider: PyTree,
    *,
    rule: str,
    form: str = "weights",
    decay: str = "inverse_rate",
    layout: PyTree = "in_out",
    depth: PyTree = None,
    alpha: float = 1.0,
) -> Scaling:
    r"""Read off two instances of a model how each leaf of its parameters follows the width.

    Axes that differ between the two grow with the width. A leaf with two of them is hidden; with one that is produced
    it is an input, a bias or a gain; with one that is summed over it is an output. Which is which, `layout` says.

    Two things are no leaf, and stay lines of the model. Attention whose heads grow in size divides q·k by that size,
    not by its root (heads that grow in number change nothing). Residual branches are multiplied by depth^-α:
    `x + block(x) / layers`.

    Args:
        tuned: parameters at the width where hyperparameters are tuned, a pytree of arrays with their initial values; or
            of shapes, from `jax.eval_shape`, which is enough for all but `rescale`.
        wider: parameters or shapes of the same model at another, larger width: any one will do.
        rule: `"adam"` for optimizers that normalize each entry of the gradient (Adam, RMSProp, Lion), `"sgd"` for those
            that follow its size.
        form: how outputs stay of the same size: `"weights"` starts them smaller; `"multiplier"` leaves that to
            `multiply` in the forward pass, and is needed where an embedding is the output layer as well.
        decay: how a decay follows, see the module: `"inverse_rate"`; `"sqrt"`, for AdamW alone; `"fixed"`, not at all.
        layout: a word, or a pytree prefix of `tuned` with words. `"in_out"`: the last axis is what a leaf produces, and
            the one before it what it sums over, as in flax, haiku and `x @ w`. `"out_in"`: the first axis and the one
            after it, as in equinox and PyTorch, but for embeddings, which are `"in_out"` everywhere. Otherwise a letter
            for each axis, not counting one of stacked layers: `i` summed over, `o` produced, `.` neither, such as
            `"ioo"` for a kernel onto several heads and `"oo"` for its bias.
        depth: None if no depth differs from the tuned one's; else a pytree prefix. A number says that a leaf is
            inside of a residual branch of a model that is so many times as deep as the tuned one, 1.0 that it is in
            none; `"stacked"`, that its first axis counts layers.
        alpha: exponent of the branches' multiplier.

    Returns:
        See `Scaling`.

    Raises:
        InputError: for trees of different structures, the same widths, an axis that shrinks, more growing axes than
            `layout` has a place for, and a leaf of equal entries that could be an output that starts at zero as well as
            a bias over two axes.
        InputTypeError: for leaves that are not floating-point arrays or shapes.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> model = lambda n: {"w": jnp.ones((64, n)), "b": jnp.ones(n), "hidden": jnp.ones((n, n)), "shift": jnp.ones(10)}
    >>> print(hg.scaling.infer(model(32), model(64), rule="adam", decay="sqrt"))
    leaf        kind    initial  rate (adam)  multiplier  decay
    ['b']       vector  1        1            1           none
    ['hidden']  hidden  m^-0.5   m^-1         1           m^0.5
    ['shift']   scalar  1        1            1           none
    ['w']       input   1        1            1           none
    """
    if rule == "sgd" and decay == "sqrt":
        raise InputError(
            "infer: decay must be 'inverse_rate' or 'fixed' with rule='sgd', found 'sqrt', which is AdamW's: its "
            "largest singular values follow the square root of rate over decay."
        )
    before, after = _shapes("tuned", tuned), _shapes("wider", wider)
    _same_paths("wider", list(after), list(before), "build both instances by the same code, at the same depth")
    words = _spread("layout", layout, tuned)
    depths = _spread("depth", 1.0 if depth is None else depth, tuned)
    kept = jax.tree.leaves(tuned)
    grow = {path: _grown(path, before[path], after[path]) for path in before}
    if not any(grow.values()):
        raise InputError(
            "infer: all shapes of tuned and wider must not be equal, found no axis that differs: pass instances of two "
            "widths; any larger one will do for wider."
        )
    leaves = {}
    for path, word, deep, value in zip(before, words, depths, kept, strict=True):
        _check_depth(path, deep, before[path])
        stacked = deep == "stacked"
        axes = tuple(axis for axis in grow[path] if not (stacked and axis == 0))
        fan_in, fan_out, inside = _fans(path, before[path], axes, word, stacked)
        kind = _kind(fan_in, fan_out, inside)
        size = _size(value)
        if fan_in and not fan_out and word in ("in_out", "out_in") and _constant(value):
            raise InputError(
                f"infer: layout must say what tuned{path} of shape {before[path]} is, found equal entries and one "
                f"growing axis, {fan_in[0]}: write {'io' if word == 'in_out' else 'oi'!r} for an output layer that "
                f"starts at zero, {'o' * (len(before[path]) - stacked)!r} for a bias or gain over both axes."
            )
        powers = _powers(kind, rule, form, decay, alpha if stacked or deep != 1.0 else None)
        leaves[path] = Leaf(
            kind, before[path], fan_in, fan_out, stacked, 1.0 if stacked else float(deep), *powers, size
        )
    return Scaling(leaves, rule)


def _powers(
    kind: str, rule: str, form: str, decay: str, alpha: float | None
) -> tuple[Power, Power, Power, Power | None, Power]:
    """Initial size, learning rate, multiplier, decay and gradient: the table at the head of this file."""
    once, inverse = Power(), Power(fan_in=-1)
    initial = update = multiplier = once
    gradient = Power(fan_out=-1) if kind in ("hidden", "input", "vector") else once
    if kind == "hidden":
        initial, update = Power(fan_in=-0.5), inverse
    elif kind == "output" and form == "weights":
        initial = update = inverse
    elif kind == "output":
        multiplier = gradient = inverse
    if alpha is not None:
        update, gradient = update._replace(depth=alpha - 1), gradient._replace(depth=-alpha)
    rate = update if rule == "adam" else Power(*(u - g for u, g in zip(update, gradient, strict=True)))
    if decay == "sqrt":
        return initial, rate, multiplier, Power(fan_in=0.5) if kind == "hidden" else None, gradient
    return initial, rate, multiplier, Power(*(-r for r in rate)) if decay == "inverse_rate" else once, gradient


SCALING = Slot(Scaling, "what hg.scaling.infer returns", "hg.scaling.infer(tuned, wider, rule='adam')")


@options(scaling=SCALING)
def factors(scaling: Scaling, params: PyTree) -> Factors:
    """What everything is multiplied by in a model of some width, relative to the tuned one: 1 at its own width.

    Args:
        scaling: what `infer` returned.
        params: parameters or shapes of the model, of any width.

    Returns:
        See `Factors`.

    Raises:
        InputError: for another model, or an axis that differs although it did not between the two instances.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> model = lambda n: {"hidden": jnp.ones((n, n)), "out": jnp.eye(n, 3)}
    >>> scaling = hg.scaling.infer(model(2), model(4), rule="adam")
    >>> hg.scaling.factors(scaling, model(32)).rate
    {'hidden': 0.0625, 'out': 0.0625}
    """
    matched = _matched("factors", scaling, params)
    structure = jax.tree.structure(params)
    found = [
        [1.0 if power == Power() else power(*ratios) for power in (leaf.initial, leaf.rate, leaf.multiplier)]
        + [0.0 if leaf.decay is None else leaf.decay(*ratios), leaf.gradient(*ratios)]
        for leaf, ratios in matched
    ]
    return Factors(*(structure.unflatten(column) for column in zip(*found, strict=True)))


@options(scaling=SCALING)
def rescale(scaling: Scaling, params: PyTree) -> PyTree:
    """Initial parameters of the sizes that they should have, whatever initializer drew them.

    Each leaf is multiplied by one number, so that the root mean square of its entries is that of the tuned model times
    the factor that `scaling` has for it. A leaf that is zero stays so.

    Args:
        scaling: what `infer` returned, from an instance with values.
        params: initial parameters of any width, as the model's own initializer drew them.

    Returns:
        A pytree like `params`.

    Raises:
        InputError: for another model, and for a scaling that was inferred from shapes alone.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> model = lambda n: {"out": jax.random.normal(jax.random.key(0), (n, 10))}
    >>> scaling = hg.scaling.infer(model(100), model(200), rule="adam")
    >>> print(f"{jnp.std(model(1600)['out']):.2f} {jnp.std(hg.scaling.rescale(scaling, model(1600))['out']):.2f}")
    1.01 0.06
    """
    matched = _matched("rescale", scaling, params)
    leaves, structure = jax.tree.flatten(params)
    scaled = []
    for (leaf, ratios), value in zip(matched, leaves, strict=True):
        if leaf.size is None:
            raise InputError(
                "rescale: scaling must be inferred from parameters with values, found shapes alone: pass the tuned "
                "model's initial parameters to hg.scaling.infer, not their shapes."
            )
        target, size = leaf.size * leaf.initial(*ratios), _size(value)
        if size is None:
            size = _tree.norm(value) / math.sqrt(max(value.size, 1))
            factor = _tree.safe_divide(target, size, otherwise=jnp.ones_like(size))
        else:
            factor = target / size if size else 1.0
        scaled.append(value if isinstance(factor, float) and factor == 1 else _product(value, factor))
    return structure.unflatten(scaled)


@options(scaling=SCALING)
def multiply(scaling: Scaling, params: PyTree) -> PyTree:
    """Parameters times their multipliers, for the forward pass of a model with `form="multiplier"`.

    Args:
        scaling: what `infer` returned.
        params: parameters of any width.

    Returns:
        A pytree like `params`, with which the model is called in place of them.

    Raises:
        InputError: for another model.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> model = lambda n: {"out": jnp.eye(n, 3)}
    >>> scaling = hg.scaling.infer(model(2), model(4), rule="adam", form="multiplier")
    >>> hg.scaling.multiply(scaling, model(8))["out"][0].tolist()
    [0.25, 0.0, 0.0]
    """
    return _times(params, factors(scaling, params).multiplier)


@options(scaling=SCALING, optimizer=OPTIMIZER)
def scaled(
    scaling: Scaling, optimizer: optax.GradientTransformation, *, gradients: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer whose hyperparameters mean the same at every width.

    Each leaf's update is multiplied by its factor of the learning rate, and the optimizer sees each parameter times
    its factor of the decay. The factors are read off the shapes: at the tuned width it is the optimizer itself. Its
    learning rate, decay and whatever else may be traced, and are those of the tuned model.

    What an optimizer does with parameters, besides adding a multiple of them to its updates, sees the factor of the
    decay as well: infer with `decay="fixed"` for lamb, lars, or a mask that looks at values.

    Args:
        scaling: what `infer` returned, with the rule of this optimizer.
        optimizer: any optax optimizer; for decays that follow, one that decays the parameters itself, as `optax.adamw`
            does.
        gradients: whether gradients are divided by their factors first, so that Adam's `eps` means the same at every
            width. A clip by their global norm then belongs in front of this transformation, not inside of it.

    Returns:
        An optax optimizer.

    Raises:
        InputError: at its first use, for parameters of another model.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, optax
    >>> model = lambda n: {"hidden": jnp.ones((n, n))}
    >>> optimizer = hg.scaling.scaled(hg.scaling.infer(model(2), model(4), rule="adam"), optax.adam(1.0))
    >>> update, state = optimizer.update(model(8), optimizer.init(model(8)))
    >>> print(f"{update['hidden'][0, 0]:.3f}")
    -0.250
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        _matched("scaled", scaling, params)
        return optimizer.init(params)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> tuple[PyTree, Any]:
        by = factors(scaling, updates)
        if gradients:
            updates = _times(updates, jax.tree.map(lambda g: 1 / g, by.gradient))
        seen = None if params is None else _times(params, by.decay)
        updates, state = optimizer.update(updates, state, seen, **extra)
        return _times(updates, by.rate), state

    return optax.GradientTransformationExtraArgs(init, update)


@options(
    optimizer=OPTIMIZER,
    steps=Number(least=1, integer=True, static=True),
    repeats=Number(least=1, integer=True, static=True),
)
def coordinate_check(
    init: Callable[[int, Array], PyTree],
    loss: Callable[[PyTree, PyTree], Array],
    activations: Callable[[PyTree, PyTree], PyTree],
    optimizer: optax.GradientTransformation,
    batch: PyTree,
    *,
    widths: Sequence[int],
    key: Array,
    steps: int = 4,
    repeats: int = 4,
) -> CoordinateCheck:
    r"""How much a few steps of training change activations and logits, at several widths: the test of a scaling.

        c_t(n) = √ mean over repeats, rows and units of (a_t − a_0)²

    Where everything scales as it should, no c_t depends on n: all `slopes` are about 0. One that grows or vanishes with
    the width points to the layer that is wrong.

    Args:
        init: from width and key to initial parameters; `rescale` belongs in here.
        loss: of parameters and batch, a scalar.
        activations: of parameters and batch, a pytree of arrays, each with any number of axes.
        optimizer: the same for all widths, such as `scaled(scaling, optax.adam(1e-2))`.
        batch: the data of every step.
        widths: at least two, each of which is compiled.
        key: for `init`.
        steps: of training.
        repeats: initial parameters at each width.

    Returns:
        See `CoordinateCheck`.

    Raises:
        InputError: for fewer than two different widths.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, optax
    >>> model = lambda n, key: {"w": jax.random.normal(key, (3, n)), "out": jax.random.normal(key, (n, 2)) / n**0.5}
    >>> forward = lambda w, x: jnp.tanh(x @ w["w"]) @ w["out"]
    >>> check = hg.scaling.coordinate_check(model, lambda w, x: jnp.mean((forward(w, x) - 1)**2), forward,
    ...                                     optax.sgd(0.1), jnp.ones((5, 3)), widths=(64, 256), key=jax.random.key(0))
    >>> check.change[""].shape, check.slopes[""] > 0.1
    ((4, 2), True)
    """
    sizes = np.asarray(widths)
    if sizes.ndim != 1 or len(set(sizes.tolist())) < 2:
        raise InputError(
            f"coordinate_check: widths must be at least two different ones, found {widths!r}: write (64, 256, 1024)."
        )

    def run(width: int, key: Array) -> tuple[PyTree, PyTree]:
        params = init(width, key)
        begin = activations(params, batch)

        def step(carry: Any, _: None) -> tuple[Any, PyTree]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
            params = optax.apply_updates(params, updates)
            moved = jax.tree.map(lambda a, b: jnp.mean((a - b) ** 2), activations(params, batch), begin)
            return (params, state), moved

        _, moved = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
        return jax.tree.map(lambda a: jnp.mean(a**2), begin), moved

    keys = jax.random.split(key, repeats)
    found = [jax.jit(jax.vmap(lambda key, width=width: run(width, key)))(keys) for width in sizes.tolist()]
    start, change = (
        [
            {_name(path): np.sqrt(np.mean(x, axis=0)) for path, x in jax.tree_util.tree_leaves_with_path(part)}
            for part in side
        ]
        for side in zip(*found, strict=True)
    )
    stacked = lambda parts: {name: np.stack([part[name] for part in parts], axis=-1) for name in parts[0]}
    return CoordinateCheck(sizes, stacked(start), stacked(change))


def _shapes(name: str, tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Shapes by path, of leaves that are floating-point arrays or shapes of such."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where = f"{name}{keystr(path)}"
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputTypeError(
                f"infer: {where} must be a floating-point array, found {type(leaf).__name__}: pass the parameters "
                "alone, as equinox.filter(model, equinox.is_inexact_array) or nnx.state(model, nnx.Param) has them."
            )
        if 0 in leaf.shape:
            raise InputError(f"infer: {where} must not be empty, found shape {leaf.shape}: leave it out of the tree.")
        found[keystr(path)] = tuple(leaf.shape)
    if not found:
        raise InputError(f"infer: {name} must have leaves, found none: pass the model's parameters.")
    return found


def _same_paths(name: str, found: list[str], expected: list[str], remedy: str) -> None:
    if found != expected:
        odd = [*(path for path in found if path not in expected), *(path for path in expected if path not in found)]
        what = f"{odd[0]}, which is in one of them alone" if odd else "another order of leaves"
        raise InputError(f"infer: {name} must have the leaves of tuned, found {what}: {remedy}.")


def _spread(name: str, prefix: PyTree, tree: PyTree) -> list[Any]:
    """A value for each leaf of `tree`."""
    try:
        full = jax.tree.map(lambda value, part: jax.tree.map(lambda _: value, part), prefix, tree)
    except ValueError as error:
        paths = ", ".join(keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))
        raise InputError(
            f"infer: {name} must be one value or a pytree prefix of tuned, whose leaves are {paths}: {error}"
        ) from error
    return jax.tree.leaves(full)


def _grown(path: str, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that are longer in the wider instance."""
    if len(before) != len(after):
        raise InputError(
            f"infer: wider{path} must have the {len(before)} axes of tuned, found shape {after} for {before}: build "
            "both instances by the same code."
        )
    for axis, (small, large) in enumerate(zip(before, after, strict=True)):
        if large < small:
            raise InputError(
                f"infer: wider{path} must not be smaller than tuned along any axis, found {large} for {small} along "
                f"axis {axis}: pass the narrower instance first, and keep fixed what is not its width."
            )
    return tuple(axis for axis, (small, large) in enumerate(zip(before, after, strict=True)) if large > small)


def _check_depth(path: str, deep: Any, shape: tuple[int, ...]) -> None:
    number = isinstance(deep, (int, float)) and not isinstance(deep, bool) and math.isfinite(deep) and deep > 0
    if not number and deep != "stacked":
        raise InputError(
            f"infer: depth must be a ratio above 0 or 'stacked', found {deep!r} for tuned{path}: write 4.0 for a model "
            "four times as deep as the tuned one."
        )
    if deep == "stacked" and not shape:
        raise InputError(f"infer: depth must be a number for tuned{path}, found 'stacked' for a leaf without an axis.")


def _fans(
    path: str, shape: tuple[int, ...], grown: tuple[int, ...], word: Any, stacked: bool
) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """The growing axes that are summed over and those that are produced, and whether the leaf sums over any axis."""
    first = int(stacked)
    axes = range(first, len(shape))
    where = f"tuned{path} of shape {shape}"
    if word in ("in_out", "out_in"):
        ordered = list(axes) if word == "out_in" else list(axes)[::-1]
        produced, summed = ordered[:1], ordered[1:2]
        if len(grown) == 2 and word == "in_out":  # heads and the like: what is summed over comes first
            produced, summed = [grown[1]], [grown[0]]
        odd = [axis for axis in grown if axis not in produced + summed]
        if odd:
            raise InputError(
                f"infer: layout must have a place for every growing axis, found {len(grown)} that grow in {where}, of "
                f"which {word!r} has none for axis {odd[0]}: write a letter for each, such as "
                f"{('oi.' if word == 'out_in' else 'ioo')!r}, or depth='stacked' for an axis of layers."
            )
    else:
        letters = isinstance(word, str) and len(word) == len(axes) and not set(word) - set("io.")
        if not letters:
            raise InputError(
                f"infer: layout must be 'in_out', 'out_in', or a letter of i, o and . for each of the {len(axes)} axes "
                f"of {where}{' but that of layers' if stacked else ''}, found {word!r}."
            )
        produced, summed = ([axis for axis, at in zip(axes, word, strict=True) if at == x] for x in "oi")
        odd = [axis for axis in grown if axis not in produced + summed]
        if odd:
            raise InputError(
                f"infer: layout must have i or o for every growing axis, found '.' for axis {odd[0]} of {where}."
            )
    return (
        tuple(axis for axis in grown if axis in summed),
        tuple(axis for axis in grown if axis in produced),
        bool(summed),
    )


def _kind(fan_in: tuple[int, ...], fan_out: tuple[int, ...], inside: bool) -> str:
    if fan_in:
        return "hidden" if fan_out else "output"
    return ("input" if inside else "vector") if fan_out else "scalar"


def _matched(function: str, scaling: Scaling, params: PyTree) -> list[tuple[Leaf, tuple[float, float, float]]]:
    """For each leaf of a model: what is known of it, and its ratios to the tuned one of fan-in, fan-out and depth."""
    shapes = {keystr(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    known = scaling.leaves
    odd = [*(path for path in shapes if path not in known), *(path for path in known if path not in shapes)]
    if odd:
        raise InputError(
            f"{function}: params must have the leaves that hg.scaling.infer saw, found {odd[0]} "
            f"{'besides' if odd[0] in shapes else 'missing'}: pass a model built by the same code."
        )
    found = []
    for path, shape in shapes.items():
        leaf = known[path]
        free = {*leaf.fan_in, *leaf.fan_out, *([0] if leaf.stacked else [])}
        fixed = [axis for axis in range(len(leaf.shape)) if axis not in free]
        if len(shape) != len(leaf.shape) or any(shape[axis] != leaf.shape[axis] for axis in fixed):
            raise InputError(
                f"{function}: params{path} must have the tuned shape {leaf.shape} but for axes {sorted(free)}, which "
                f"were seen to grow, found {shape}: infer from two instances that differ as this one does."
            )
        ratio = lambda axes, shape=shape, leaf=leaf: math.prod(shape[axis] / leaf.shape[axis] for axis in axes)
        found.append((leaf, (ratio(leaf.fan_in), ratio(leaf.fan_out), ratio((0,)) if leaf.stacked else leaf.depth)))
    return found


def _times(tree: PyTree, by: PyTree) -> PyTree:
    """Each leaf times its number; untouched where that is 1."""
    return jax.tree.map(lambda x, f: x if f == 1 else _product(x, f), tree, by)


def _product(x: Any, factor: Any) -> Array:
    """In the dtype of `x`."""
    return x * jnp.asarray(factor, jnp.result_type(x))


def _size(value: Any) -> float | None:
    """The root mean square of a leaf whose values are known."""
    if isinstance(value, (jax.ShapeDtypeStruct, Tracer)):
        return None
    return float(np.sqrt(np.mean(np.asarray(value).astype(np.float64) ** 2)))


def _constant(value: Any) -> bool:
    if isinstance(value, (jax.ShapeDtypeStruct, Tracer)):
        return False
    entries = np.asarray(value)
    return bool(np.all(entries == entries.flat[0]))


def _name(path: Any) -> str:
    """`block.0` for `['block'][0]`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _slope(widths: np.ndarray, sizes: np.ndarray) -> float:
    if not (np.all(np.isfinite(sizes)) and np.all(sizes > 0)):
        return math.nan
    return float(np.polyfit(np.log(widths), np.log(sizes.astype(float)), 1)[0])


def _shown(power: Power | None) -> str:
    """`m^-1`, where fan-in and fan-out grow alike, times a power of the depth."""
    if power is None:
        return "none"
    parts = [f"{letter}^{value:g}" for letter, value in (("m", power.width), ("M", power.depth)) if value]
    return " ".join(parts) or "1"
