# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a plain model to a self-tuned one
#
# A dropout rate cannot be tuned by differentiating the training loss: a mask has no derivative in its rate. A
# self-tuning network learns how its parameters respond to the rate while it trains, and follows the validation loss
# through that response. This page takes a small flax model there in three steps.

# %%
# Installs hypergrad where it is missing, as in Colab; elsewhere this cell does nothing.
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("hypergrad") is None:
    SOURCE = "..[demo,flax]"  # the folder of the project
    if SOURCE.startswith("..") and not Path("../pyproject.toml").exists():
        raise ModuleNotFoundError(
            "hypergrad is not installed, and the project is not in the folder above this notebook. Upload the "
            "project's folder or its wheel, then run: %pip install 'PATH[demo,flax]', with its path for PATH."
        )
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE], check=True)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import hypergrad as hg

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
train, valid, test = (x[:200], y[:200]), (x[200:700], y[200:700]), (x[700:], y[700:])
STEPS = 60  # outer steps; a real run takes hundreds


# %% [markdown]
# ## 1. The plain model


# %%
class Plain(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x, rate=None, key=None):
        x = jax.nn.relu(self.first(x))
        x = x if rate is None else hg.augment.dropout(x, rate, key=key)
        return self.last(x)


graph, state = nnx.split(Plain(nnx.Rngs(0)))
params = nnx.to_pure_dict(state)


def cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


# %% [markdown]
# ## 2. Tuned as it is
#
# Two losses: training with dropout at a rate that is handed in, validation without dropout. The model stays as it is;
# `hg.responses.structured()`, the default, hands it parameters that depend on the rate. `domain` keeps the rate in
# [0, 0.9]. Each of `perturb=4` groups of a batch has a rate of its own, drawn around the current one.


# %%
def inner_loss(params, rate, batch, key):
    return cross_entropy(nnx.merge(graph, params)(batch[0], rate, key), batch[1])


def outer_loss(params, rate, batch):
    return cross_entropy(nnx.merge(graph, params)(batch[0]), batch[1])


domain = hg.domains.interval(0, 0.9)
solver = hg.self_tuning(
    hg.Problem(inner_loss, outer_loss), optimizer=optax.adam(3e-3), steps=5, domain=domain, perturb=4
)
plain = result = hg.tune(
    solver,
    params,
    0.1,
    hg.minibatches(train, 40),
    valid,
    test=test,
    outer=optax.adam(3e-2),
    steps=STEPS,
    domain=domain,
    key=jax.random.key(0),
    progress=False,
)
print(result)

# %% [markdown]
# Early steps move the rate before anything has been learned of its effect, and training goes on to overfit after the
# best one: `result.best` holds the parameters and the rate at the lowest validation loss, `result.params` the last.

# %% [markdown]
# ## 3. A rate for each example
#
# Parameters for each example would be a matrix for each; layers that respond gate their units instead, for about twice
# the cost of plain layers. Two lines of the model change, and the losses get `(params, offset)` from
# `hg.responses.gated()`: `offset` goes to every layer, and `rate` has one entry for each example.


# %%
class Responding(nnx.Module):
    def __init__(self, rngs):
        dense = hg.responses.layers.HyperDense
        self.first, self.last = dense(64, 32, hparams=1, rngs=rngs), dense(32, 10, hparams=1, rngs=rngs)

    def __call__(self, x, offset, rate=None, key=None):
        x = jax.nn.relu(self.first(x, offset))
        x = x if rate is None else hg.augment.dropout(x, rate, key=key)
        return self.last(x, offset)


graph, state = nnx.split(Responding(nnx.Rngs(0)))


def inner_loss(pair, rate, batch, key):
    params, offset = pair
    return cross_entropy(nnx.merge(graph, params)(batch[0], offset, rate, key), batch[1])


def outer_loss(pair, rate, batch):
    params, offset = pair
    return cross_entropy(nnx.merge(graph, params)(batch[0], offset), batch[1])


solver = hg.self_tuning(
    hg.Problem(inner_loss, outer_loss),
    response=hg.responses.gated(),
    perturb="example",
    optimizer=optax.adam(3e-3),
    steps=5,
    domain=domain,
    scale_optimizer=optax.adam(1e-2),
)
result = hg.tune(
    solver,
    nnx.to_pure_dict(state),
    0.1,
    hg.minibatches(train, 40),
    valid,
    test=test,
    outer=optax.adam(3e-2),
    steps=STEPS,
    domain=domain,
    key=jax.random.key(0),
    progress=False,
)
print(result)
scale = np.asarray(result.history.extra["scale"])
print(f"scale of the perturbation: {scale[0]:.3f} -> {scale[-1]:.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for name, run, color in (("one rate a group", plain, "#0072B2"), ("a rate an example", result, "#D55E00")):
    axes[0].plot(run.history.value, color=color, label=name)
    axes[1].plot(np.asarray(run.history.hparams), color=color)
axes[0].set(xlabel="outer step", ylabel="validation loss", yscale="log")
axes[1].set(xlabel="outer step", ylabel="dropout rate")
axes[0].legend(frameon=False)
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## 4. Did it help?
#
# Five fixed rates, each trained for as many steps of the same optimizer on the same rows, and kept at its lowest
# validation loss.


# %%
graph, state = nnx.split(Plain(nnx.Rngs(0)))
optimizer = optax.adam(3e-3)


def loss(params, batch):
    return cross_entropy(nnx.merge(graph, params)(batch[0]), batch[1])


def run(params, rate, key):
    def step(carry, key):
        params, moments = carry
        rows = jax.random.randint(key, (40,), 0, len(y[:200]))
        batch = train[0][rows], train[1][rows]
        objective = lambda p: cross_entropy(nnx.merge(graph, p)(batch[0], rate, key), batch[1])
        updates, moments = optimizer.update(jax.grad(objective)(params), moments)
        params = optax.apply_updates(params, updates)
        return (params, moments), (loss(params, valid), loss(params, test))

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 5 * STEPS))[1]


rates = jnp.linspace(0.0, 0.8, 5)
on_valid, on_test = jax.jit(jax.vmap(run, (None, 0, None)))(nnx.to_pure_dict(state), rates, jax.random.key(1))
for rate, v, t in zip(rates, on_valid, on_test, strict=True):
    print(f"fixed rate {rate:.1f}: test loss {float(t[jnp.argmin(v)]):.3f}")
print(f"self-tuned, a rate a group:    {plain.test:.3f}")
print(f"self-tuned, a rate an example: {result.test:.3f}")

# %% [markdown]
# After 300 steps this small network does not need dropout: a rate of zero is best of the grid, and both runs moved
# towards it in a single training, from 0.1. In the longer ones of [the
# experiment](../experiments/self_tuning_digits/README.md) it does: there self-tuning is ahead of random search at the
# cost of up to four runs, and level with it at twelve.
