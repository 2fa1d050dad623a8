r"""Hyperparameters drawn from their posterior, for predictions that average over them.

    p(λ | y) ∝ p(y | λ) p(λ),    by Hamiltonian Monte Carlo over unconstrained λ

Source: Neal 2011, "MCMC using Hamiltonian dynamics"; Lalchand & Rasmussen 2020, arXiv:1912.13440 (of Gaussian
processes). The sampler and its warm-up are those of blackjax.
Cost: `steps` gradients of the log density for each draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._checks import check_hparams, install
from hypergrad._options import Number, Slot, options
from hypergrad._solver import HypergradError
from hypergrad._tree import PyTree


class HMCSamples(NamedTuple):
    """Hyperparameters drawn by `hmc`.

    Attributes:
        hparams: pytree of samples, `[samples, ...]`.
        acceptance: mean acceptance probability.
        divergent: number of divergent trajectories; even a few suggest that the sampler avoids a region.
        step_size: step size of the integrator, found in the warm-up.
    """

    hparams: PyTree
    acceptance: Array
    divergent: Array
    step_size: Array


@options(
    log_density=Slot(("__call__",), "a function", "log_density(hparams) -> scalar"),
    samples=Number(least=1, integer=True, static=True),
    warmup=Number(least=20, integer=True, static=True),
    steps=Number(least=1, integer=True, static=True),
)
def hmc(
    log_density: Callable[[PyTree], Array],
    start: PyTree,
    *,
    key: Array,
    samples: int,
    warmup: int = 300,
    steps: int = 10,
) -> HMCSamples:
    r"""Draw hyperparameters from their posterior by Hamiltonian Monte Carlo, for predictions that average over them.

    Step size and the scale of each hyperparameter are adapted in the warm-up (blackjax). Cost: `steps` gradients for
    each draw.

    Args:
        log_density: `hparams -> scalar`, unnormalised: log evidence (not per point) plus log prior, over unconstrained
            hyperparameters.
        start: pytree of hyperparameters.
        key: PRNG key.
        samples: number of draws.
        warmup: number of adaptation steps before the first draw.
        steps: number of integrator steps for each draw.

    Returns:
        `HMCSamples`.

    Raises:
        InputError: for a number of draws or steps out of range.
        InputTypeError: for something that is not a function, and hyperparameters that are not real numbers.
        HypergradError: if blackjax is not installed.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> normal = lambda h: -0.5 * jnp.sum((h - 3.0)**2)
    >>> found = hg.objectives.hmc(normal, 0.0, key=jax.random.key(0), samples=500, warmup=100)
    >>> found.hparams.shape, bool(abs(jnp.mean(found.hparams) - 3) < 0.3)
    ((500,), True)
    """
    blackjax = _blackjax()
    start = check_hparams(start)
    tune_key, draw_key = jax.random.split(key)

    @jax.jit
    def run(start: PyTree) -> HMCSamples:
        adapt = blackjax.window_adaptation(blackjax.hmc, log_density, num_integration_steps=int(steps))
        (state, found), _ = adapt.run(tune_key, start, int(warmup))
        sampler = blackjax.hmc(log_density, **found)

        def draw(state: Any, key: Array) -> tuple[Any, Any]:
            state, info = sampler.step(key, state)
            return state, (state.position, info.acceptance_rate, info.is_divergent)

        _, (drawn, rate, divergent) = jax.lax.scan(draw, state, jax.random.split(draw_key, int(samples)))
        return HMCSamples(drawn, jnp.mean(rate), jnp.sum(divergent), jnp.asarray(found["step_size"]))

    return run(start)


def _blackjax() -> Any:
    try:
        import blackjax
    except ImportError as error:
        raise HypergradError(f"hmc needs blackjax: {install('gp')}.") from error

    return blackjax
