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
# # Quickstart: one penalty per feature, in ten lines
#
# Two losses go in: one to train on, one to judge by. Out come hyperparameters that were moved by the gradient of
# the second through the first, and with each of these gradients an estimate of its error. Data: scikit-learn's
# diabetes.

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
from sklearn.datasets import load_diabetes

import hypergrad as hg

bunch = load_diabetes(scaled=False)
x, y = (bunch.data - bunch.data.mean(0)) / bunch.data.std(0), (bunch.target - bunch.target.mean()) / bunch.target.std()
x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
train, valid, test = (x[:100], y[:100]), (x[100:270], y[100:270]), (x[270:], y[270:])

# %% [markdown]
# ## The ten lines
#
# The hyperparameters are the logarithms of ten ridge strengths. `hg.implicit` trains to the optimum and
# differentiates it by the implicit function theorem; `test=` is looked at once, at the end.


# %%
def error(w, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


problem = hg.Problem(
    inner_loss=lambda w, log_l2, batch: error(w, batch) + jnp.sum(jnp.exp(log_l2) * w**2),
    outer_loss=lambda w, log_l2, batch: error(w, batch),
)
start = jnp.full(10, -3.0)
result = hg.tune(
    hg.implicit(problem),
    jnp.zeros(10),
    start,
    train,
    valid,
    test=test,
    outer=optax.adam(0.1),
    steps=100,
    progress=False,
)
print(result)

# %% [markdown]
# ## Can it be trusted?
#
# Every hypergradient has a status and an `error_estimate`, relative to its length. Here are all hundred of them.

# %%
history = result.history
print("usable:", int(history.usable.sum()), "of", len(history.usable))
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
hg.diagnostics.plots.losses(result, ax=axes[0])
axes[1].semilogy(history.error_estimate, color="#0072B2")
axes[1].set(xlabel="outer step", ylabel="relative error, estimated")
order = np.argsort(-np.asarray(result.best.hparams))
axes[2].barh([bunch.feature_names[i] for i in order], np.asarray(jnp.exp(result.best.hparams))[order], color="#0072B2")
axes[2].set(xscale="log", xlabel="ridge strength found")
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Did it help?
#
# Against the untuned start, and against one strength for all, found on a grid of 25 with the same validation
# rows.

# %%
w_star = hg.best_response(problem)
at = jax.jit(lambda log_l2, batch: error(w_star(log_l2, jnp.zeros(10), train), batch))
grid = [jnp.full(10, value) for value in np.linspace(-8, 2, 25)]
one = min(grid, key=lambda log_l2: float(at(log_l2, valid)))
for name, log_l2 in {
    "untuned": start,
    "one strength, by grid": one,
    "ten strengths, tuned": result.best.hparams,
}.items():
    print(f"{name:22} validation {float(at(log_l2, valid)):.3f}   test {float(at(log_l2, test)):.3f}")

# %% [markdown]
# The validation error falls; on a hundred training rows and a single split the test error says how much of that
# carries over. [Is my hypergradient right, and did tuning help](is_it_right.ipynb) goes on from here.
#
# ## Another method is another word

# %%
solver = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.05), steps=100))
state = solver.init(jnp.zeros(10), start)
out, state = jax.jit(solver.hypergrad)(state, start, train, valid)
implicit = hg.implicit(problem)
exact, _ = jax.jit(implicit.hypergrad)(implicit.init(jnp.zeros(10), start), start, train, valid)
print("unrolled 100 steps:", np.asarray(out.grad)[:4].round(4))
print("implicit          :", np.asarray(exact.grad)[:4].round(4))
