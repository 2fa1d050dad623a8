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
# # A flax net with batch normalization and dropout
#
# The adapter turns a module into parameters, a model state and two functions: statistics move in training and are
# frozen in validation, and every step draws a fresh mask. Tuned here: one weight decay per layer, by
# differentiating the training.

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
from hypergrad.adapters.nnx import split

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
train, valid, test = (x[:100], y[:100]), (x[100:600], y[100:600]), (x[600:], y[600:])

# %% [markdown]
# ## The model, and one line

# %%
rngs = nnx.Rngs(0)
model = split(
    nnx.Sequential(
        nnx.Linear(64, 32, rngs=rngs),
        nnx.BatchNorm(32, momentum=0.9, rngs=rngs),
        jax.nn.relu,
        nnx.Dropout(0.2, rngs=rngs),
        nnx.Linear(32, 10, rngs=rngs),
    )
)
print(jax.tree.map(jnp.shape, model.params))

# %% [markdown]
# ## Two losses
#
# `model.train` returns the advanced statistics as well, and the inner loss hands them on; `model.evaluate` reads
# them.


# %%
def cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def inner_loss(params, log_decay, batch, key, model_state):
    logits, model_state = model.train(params, model_state, batch[0], key)
    decays = [jnp.exp(log_decay[0]), jnp.exp(log_decay[1])]
    weights = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]  # both kernels
    penalty = sum(d * jnp.sum(w**2) for d, w in zip(decays, weights, strict=True))
    return cross_entropy(logits, batch[1]) + penalty, model_state


def outer_loss(params, log_decay, batch, key, model_state):
    return cross_entropy(model.evaluate(params, model_state, batch[0]), batch[1])


problem = hg.Problem(inner_loss, outer_loss, model_state=True)
solver = hg.unrolled(problem, inner=hg.inner.gradient(optax.adam(1e-2), steps=60))
result = hg.tune(
    solver,
    model.params,
    jnp.array([-7.0, -7.0]),
    train,
    valid,
    test=test,
    model_state=model.model_state,
    key=jax.random.key(0),
    outer=optax.adam(0.3),
    steps=25,
    progress=False,
)
print(result)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
hg.diagnostics.plots.losses(result, ax=axes[0])
axes[1].plot(np.exp(np.asarray(result.history.hparams)), label=["first layer", "last layer"])
axes[1].set(xlabel="outer step", ylabel="weight decay", yscale="log")
axes[1].legend(frameon=False)
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Did it help?
#
# `tune` says that the error of these hypergradients is unknown: batch normalization frees the scale of the first layer,
# and Adam turns the smallest gradients into whole steps, so that rounding alone separates two runs. The steps may be
# good all the same, and fresh masks tell: the mean over five, at the start and at the decays found.
# Behind a normalization a decay does little, and the gain is about as large as what the masks leave open.

# %%
evaluate = jax.jit(solver.evaluate)
for name, decays in {"untuned": jnp.array([-7.0, -7.0]), "tuned": result.best.hparams}.items():
    losses = []
    for seed in range(5):
        state = solver.init(model.params, decays, model_state=model.model_state)
        losses.append(float(evaluate(state, decays, train, test, key=jax.random.key(100 + seed))[0]))
    print(f"{name:8} test loss {np.mean(losses):.3f} ± {np.std(losses) / 5**0.5:.3f}")

# %% [markdown]
# ## Take the model away
#
# `retrain` trains once more at the decays found, here on the validation digits as well; `merge` gives an nnx module
# back, in evaluation mode.

# %%
both = tuple(jnp.concatenate(pair) for pair in zip(train, valid, strict=True))
fresh = result.retrain(solver, model.params, both, test, key=jax.random.key(1), model_state=model.model_state)
net = model.merge(fresh.params, fresh.state.model_state)
print(f"{type(net).__name__}: test accuracy {np.mean(np.argmax(net(test[0]), 1) == test[1]):.3f}")
