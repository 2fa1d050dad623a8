r"""Implicit hypergradients while a network trains: `hg.implicit` with options that were chosen by measurement.

    w ← a few steps of the optimizer,   (∂²_{ww} h + δ) v ≈ ∂_w f in a few products,   g = ∂_λ f − (∂²_{λw} h) v

Source: Lorraine, Vicol & Duvenaud 2020, arXiv:1911.02590, who sum a Neumann series. Differs: that series diverges on
the Hessian of a network in training, which is indefinite. Here conjugate gradients use the products, and stop where
they meet negative curvature (Steihaug 1983); where the model and its loss are given separately, the Gauss-Newton
matrix, which has no negative curvature, replaces the Hessian. The options were chosen by `experiments/networks`: all of
30 steps are usable on six networks, from MLPs to a transformer.
Cost: the training steps, the products (two gradients each), and four gradients. Memory O(|w|).
"""

from __future__ import annotations

from jax.typing import ArrayLike
from optax import GradientTransformation

from hypergrad._options import Number, options
from hypergrad._problem import PROBLEM, Composed, Problem
from hypergrad._solver import Solver
from hypergrad.inner.gradient import OPTIMIZER, gradient
from hypergrad.linear.cg import cg
from hypergrad.solvers.implicit import implicit

_DAMPING = {"hessian": 0.1, "gauss_newton": 0.01}  # relative, see `hg.implicit`


@options(
    problem=PROBLEM,
    optimizer=OPTIMIZER,
    steps=Number(least=1, integer=True, static=True),
    products=Number(least=1, integer=True),
)
def online(problem: Problem, optimizer: GradientTransformation, *, steps: int = 10, products: ArrayLike = 5) -> Solver:
    """Hypergradients of a network while it trains, for hyperparameters that move the optimum of the training loss.

    It is `hg.implicit(problem, inner=hg.inner.gradient(optimizer, steps=steps), linear=hg.linear.cg(max_steps=products,
    indefinite="truncate"), curvature=..., damping=...)`. If the inner loss is written as `hg.compose(outputs, loss)`,
    which is the better choice for a network, the curvature is the Gauss-Newton matrix with a damping of 0.01; otherwise
    it is the Hessian with a damping of 0.1.

    Each call continues training from where the last one ended. The result claims no accuracy: it is a direction to step
    along, for example with `outer=optax.adam(...)`, and `info.error_estimate` is usually `inf`.

    Args:
        problem: the two losses.
        optimizer: an optax optimizer for the parameters.
        steps: training steps in each call, a Python integer.
        products: the most products with the curvature in each call.

    Returns:
        A `Solver`, see `hg.implicit`.

    Raises:
        InputError: for a number of steps or products that is not a positive integer.
        InputTypeError: for an optimizer that is not an optax optimizer.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, optax
    >>> x, y = jnp.eye(3), jnp.arange(3.0)
    >>> inner_loss = hg.compose(lambda w, l2, batch: jnp.tanh(x @ w),
    ...                         lambda out, w, l2, batch: jnp.sum((out - y)**2) + l2 * jnp.sum(w**2))
    >>> problem = hg.Problem(inner_loss, lambda w, l2, batch: jnp.sum((jnp.tanh(x @ w) - 0.5 * y)**2))
    >>> solver = hg.online(problem, optax.adam(1e-2))
    >>> out, state = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(3), 0.1), 0.1)
    >>> hg.Status(int(out.info.status)).name, int(out.info.inner_steps)
    ('OK', 10)
    """
    curvature = "gauss_newton" if isinstance(problem.inner_loss, Composed) else "hessian"
    solver = implicit(
        problem,
        inner=gradient(optimizer, steps=steps),
        linear=cg(max_steps=products, indefinite="truncate"),
        curvature=curvature,
        damping=_DAMPING[curvature],
    )
    return solver._replace(about=solver.about._replace(name="hg.online"))
