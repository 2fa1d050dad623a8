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
# # Decay, label smoothing and a rate per layer
#
# The optimizer's own hyperparameters have no place in the training loss, so the run itself is differentiated:
# `hg.unrolled` goes back through every step. Five numbers of three kinds, each kept where it makes sense by a
# domain.

# %%
# Installs hypergrad where it is missing, as in Colab; elsewhere this cell does nothing.
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("hypergrad") is None:
    SOURCE = "..[demo]"  # the folder of the project
    if SOURCE.startswith("..") and not Path("../pyproject.toml").exists():
        raise ModuleNotFoundError(
            "hypergrad is not installed, and the project is not in the folder above this notebook. Upload the "
            "project's folder or its wheel, then run: %pip install 'PATH[demo]', with its path for PATH."
        )
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE], check=True)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits

import hypergrad as hg

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
train, valid, test = (x[:100], y[:100]), (x[100:600], y[100:600]), (x[600:], y[600:])
keys = jax.random.split(jax.random.key(0))
params = {
    "hidden": {"w": jax.random.normal(keys[0], (64, 32)) / 8, "b": jnp.zeros(32)},
    "last": {"w": jax.random.normal(keys[1], (32, 10)) / 6, "b": jnp.zeros(10)},
}


def logits(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["last"]["w"] + params["last"]["b"]


# %% [markdown]
# ## Losses and optimizer
#
# Smoothing and decay are in the inner loss; the rates are in the optimizer, which is a function of the
# hyperparameters.


# %%
def inner_loss(params, h, batch):
    soft = optax.smooth_labels(jax.nn.one_hot(batch[1], 10), h["smoothing"])
    loss = jnp.mean(optax.softmax_cross_entropy(logits(params, batch[0]), soft))
    return loss + h["decay"] * sum(jnp.sum(layer["w"] ** 2) for layer in params.values())


def outer_loss(params, h, batch):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, batch[0]), batch[1]))


def optimizer(h):
    rates = {name: optax.sgd(h["rate"][name], momentum=h["momentum"]) for name in ("hidden", "last")}
    return optax.multi_transform(rates, {name: name for name in rates})


hparams = {"decay": 1e-4, "smoothing": 0.1, "momentum": 0.5, "rate": {"hidden": 0.1, "last": 0.1}}
domain = {
    "decay": hg.domains.log(),
    "smoothing": hg.domains.interval(0, 0.5),
    "momentum": hg.domains.interval(0, 0.99),
    "rate": hg.domains.log(),
}

# %%
solver = hg.unrolled(hg.Problem(inner_loss, outer_loss), inner=hg.inner.gradient(optimizer, steps=60))
result = hg.tune(
    solver, params, hparams, train, valid, test=test, domain=domain, outer=optax.adam(0.1), steps=60, progress=False
)
print(result)

# %%
axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")[1]
hg.diagnostics.plots.losses(result, ax=axes[0])
history = result.history.hparams
for name, values in {
    "decay": history["decay"],
    "smoothing": history["smoothing"],
    "momentum": history["momentum"],
    "rate, hidden": history["rate"]["hidden"],
    "rate, last": history["rate"]["last"],
}.items():
    axes[1].plot(values, label=name)
axes[1].set(yscale="log", xlabel="outer step", ylabel="hyperparameter")
axes[1].legend(frameon=False, fontsize=8, ncols=2)
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Did it help?
#
# Against 25 random draws over wide ranges: a step of tuning costs two to three trainings, so sixty of them are
# worth more draws than that. The draws run side by side under `jax.vmap`.


# %%
def trained(h):
    state = solver.init(params, h)
    value, _, state = solver.evaluate(state, h, train, valid)
    return value, outer_loss(solver.response(state, h), h, test)


def draw(key):
    k = jax.random.split(key, 5)
    log = lambda key, low, high: jnp.exp(jax.random.uniform(key, minval=jnp.log(low), maxval=jnp.log(high)))
    return {
        "decay": log(k[0], 1e-6, 1e-2),
        "smoothing": 0.3 * jax.random.uniform(k[1]),
        "momentum": 0.95 * jax.random.uniform(k[2]),
        "rate": {"hidden": log(k[3], 0.01, 3), "last": log(k[4], 0.01, 3)},
    }


value, unseen = jax.jit(jax.vmap(lambda key: trained(draw(key))))(jax.random.split(jax.random.key(1), 150))
best = int(jnp.nanargmin(value))
print(f"random search, 150 trainings: validation {value[best]:.3f}, test {unseen[best]:.3f}")
print(f"tuned by gradient, 60 steps:  validation {result.best.value:.3f}, test {result.test:.3f}")
