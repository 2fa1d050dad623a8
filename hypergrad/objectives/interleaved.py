r"""Alternate training and tuning: the schedule of the marginal-likelihood papers.

    burn_in training steps;  then repeat:   `hyper_steps` steps of λ at fixed w,   `steps` training steps of w

One call of the solver is one step of λ. The first call trains for `burn_in` steps, and every `hyper_steps`-th after it
for `steps`; the calls between do not train, and cost a direct derivative of the outer loss.

Source: Immer et al. 2021, arXiv:2104.04975, and 2023, arXiv:2306.03968 (burn-in of 10 epochs, then every 5 epochs 50
steps of Adam at 0.1 on the logarithm of the prior precision). Differs: counted in steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from hypergrad._options import Number, options
from hypergrad._problem import PROBLEM, Problem
from hypergrad._solver import About, Hypergradient, Info, Solver, evaluation
from hypergrad._tree import PyTree
from hypergrad.inner.gradient import OPTIMIZER, gradient
from hypergrad.solvers._call import owned
from hypergrad.solvers.direct import DirectState, direct

_COUNT = Number(least=1, integer=True, static=True)


class InterleavedState(NamedTuple):
    """The state from which the next call starts.

    Attributes:
        direct: parameters and the optimizer's state.
        calls: int32, how many there have been.
    """

    direct: DirectState
    calls: Array

    @property
    def options(self) -> dict[str, Any]:
        """No option may be replaced, since each call sets its own number of training steps."""
        return {}


@options(problem=PROBLEM, optimizer=OPTIMIZER, burn_in=_COUNT._replace(least=0), steps=_COUNT, hyper_steps=_COUNT)
def interleaved(
    problem: Problem, optimizer: optax.GradientTransformation, *, burn_in: int, steps: int, hyper_steps: int
) -> Solver:
    """Alternate between training and a few steps of the hyperparameters, so that evidence is tuned during training.

    The parameters stay where they are during a step of the hyperparameters, which sees the direct derivative of the
    outer loss alone, as in `hg.direct`.

    Args:
        problem: `hg.Problem(*hg.objectives.evidence(...))`, or any whose outer loss is worth its direct derivative.
        optimizer: of the parameters; its state, and so a schedule's position, is carried on.
        burn_in: training steps before the first step of the hyperparameters.
        steps: training steps between two rounds.
        hyper_steps: steps of the hyperparameters in a round.

    Returns:
        A `Solver`. Training is a budget that claims no optimum, so that `info.error_estimate` is infinite;
        `info.inner_steps` says how many training steps a call took.

    Raises:
        InputError: for counts out of range.
        InputTypeError: for counts that are not integers, or for something that is not a problem or an optimizer.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> data = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([1.1, 2.1, 2.9])
    >>> losses = hg.objectives.evidence(lambda w, h, x: x @ w, likelihood="gaussian", rows=3, noise=0.1,
    ...                                 precision=lambda h: jnp.exp(h["log_precision"]))
    >>> solver = hg.objectives.interleaved(hg.Problem(*losses), optax.adam(0.1), burn_in=100, steps=20, hyper_steps=10)
    >>> result = hg.tune(solver, jnp.zeros(1), {"log_precision": 3.0}, data, data, outer=optax.adam(0.1), steps=100,
    ...                  progress=False)
    >>> print(result.history.inner_steps[[0, 1, 9, 10, 11]])
    [100   0   0  20   0]
    """
    inner = gradient(optimizer, steps=max(burn_in, steps))
    base = direct(problem, inner=inner)
    value_alone = evaluation(base)

    def budget(state: InterleavedState) -> DirectState:
        at_start = jnp.where(state.calls % hyper_steps == 0, steps, 0)
        budget = jnp.where(state.calls == 0, burn_in, at_start).astype(jnp.int32)
        options = {**state.direct.options, "inner": {**state.direct.options["inner"], "max_steps": budget}}
        return state.direct._replace(options=options)

    def init(
        params: PyTree, hparams: PyTree, *, key: Array | None = None, model_state: PyTree = None
    ) -> InterleavedState:
        return InterleavedState(base.init(params, hparams, key=key, model_state=model_state), jnp.zeros((), jnp.int32))

    def hypergrad(
        state: InterleavedState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Any = None
    ) -> tuple[Hypergradient, InterleavedState]:
        out, after = base.hypergrad(budget(state), hparams, train, valid, key=key)
        return out, InterleavedState(after, state.calls + 1)

    def evaluate(
        state: InterleavedState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Any = None
    ) -> tuple[Array, Info, InterleavedState]:
        value, info, after = value_alone(budget(state), hparams, train, valid, key=key)
        return value, info, InterleavedState(after, state.calls + 1)

    about = About(
        "hg.objectives.interleaved",
        "direct",
        biases=base.about.biases,
        trains_on=True,
    )
    return Solver(owned(init), hypergrad, lambda state, hparams: base.response(state.direct, hparams), evaluate, about)
