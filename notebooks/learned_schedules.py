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
# # A schedule with a number for every step
#
# Forty learning rates and forty momenta, one pair for each step of training, are more than any search can cover.
# One gradient through the run gives the derivative by all eighty.

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
import numpy as np
import optax
from sklearn.datasets import load_digits

import hypergrad as hg

STEPS = 40
images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
train, valid, test = (x[:400], y[:400]), (x[400:1000], y[400:1000]), (x[1000:], y[1000:])
keys = jax.random.split(jax.random.key(0))
params = {"a": jax.random.normal(keys[0], (64, 32)) / 8, "b": jax.random.normal(keys[1], (32, 10)) / 6}


def loss(params, h, batch):
    logits = jnp.tanh(batch[0] @ params["a"]) @ params["b"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


# %% [markdown]
# The optimizer is a function of the hyperparameters; a schedule may index into them.


# %%
def optimizer(h):
    return optax.sgd(lambda step: h["rate"][step], momentum=h["momentum"][0])


solver = hg.unrolled(hg.Problem(loss, loss), inner=hg.inner.gradient(optimizer, steps=STEPS))
start = {"rate": jnp.full(STEPS, 0.2), "momentum": jnp.full(1, 0.5)}
domain = {"rate": hg.domains.log(), "momentum": hg.domains.interval(0, 0.99)}
result = hg.tune(
    solver, params, start, train, valid, test=test, domain=domain, outer=optax.adam(0.05), steps=120, progress=False
)
print(result)

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
hg.diagnostics.plots.losses(result, ax=axes[0])
shades = plt.get_cmap("viridis")
for step in (0, 20, 40, 80, 119):
    axes[1].plot(np.asarray(result.history.hparams["rate"])[step], color=shades(step / 130), label=f"outer step {step}")
axes[1].set(xlabel="training step", ylabel="learning rate")
axes[1].legend(frameon=False, fontsize=8)
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Did it help?
#
# The usual schedules, each with its peak rate and momentum searched over the same validation rows: 100 trainings
# each.

# %%
shapes = {
    "constant": jnp.ones(STEPS),
    "cosine": 0.5 * (1 + jnp.cos(jnp.pi * jnp.arange(STEPS) / STEPS)),
    "linear": 1 - jnp.arange(STEPS) / STEPS,
}


def run(shape, peak, momentum):
    h = {"rate": peak * shape, "momentum": momentum[None]}
    value, _, state = solver.evaluate(solver.init(params, h), h, train, valid)
    return value, loss(solver.response(state, h), h, test)


peaks, momenta = (v.ravel() for v in jnp.meshgrid(jnp.geomspace(0.05, 5, 20), jnp.linspace(0, 0.95, 5)))
search = jax.jit(jax.vmap(run, (None, 0, 0)))
for name, shape in shapes.items():
    value, unseen = search(shape, peaks, momenta)
    best = int(jnp.nanargmin(value))
    print(f"{name:9} peak {peaks[best]:.2f}, momentum {momenta[best]:.2f}: test loss {unseen[best]:.3f}")
print(f"learned, {STEPS + 1} hyperparameters:      test loss {result.test:.3f}")

# %% [markdown]
# The learned schedule belongs to these initial weights as well as to the data: [the
# experiment](../experiments/learned_schedule/README.md) retrains from others, over three seeds, and there the
# lead over the best searched schedule is within the noise.
