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
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import hypergrad as hg

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
train, valid = (x[:200], y[:200]), (x[200:400], y[200:400])
SMALL = 10  # outer steps; a real run takes hundreds


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
result = hg.tune(
    solver,
    params,
    0.1,
    hg.minibatches(train, 40),
    valid,
    outer=optax.adam(3e-2),
    steps=SMALL,
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
    outer=optax.adam(3e-2),
    steps=SMALL,
    domain=domain,
    key=jax.random.key(0),
    progress=False,
)
print(result)
print("scale of the perturbation:", result.history.extra["scale"])
