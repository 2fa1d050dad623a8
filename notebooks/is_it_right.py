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
# # Is my hypergradient right, and did tuning help?
#
# Two questions that a falling validation loss does not answer. The first has a check, the second needs data that
# nothing was chosen by.

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
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

import hypergrad as hg

jax.config.update("jax_enable_x64", True)  # finite differences want the digits
bunch = load_breast_cancer()
order = np.random.default_rng(0).permutation(len(bunch.target))
x = ((bunch.data - bunch.data.mean(0)) / bunch.data.std(0))[order]
y = bunch.target[order].astype(float)
train, valid, test = (x[:100], y[:100]), (x[100:160], y[100:160]), (x[160:], y[160:])


def error(w, batch):
    return jnp.mean(optax.sigmoid_binary_cross_entropy(batch[0] @ w, batch[1]))


problem = hg.Problem(
    lambda w, log_l2, batch: error(w, batch) + 0.5 * jnp.sum(jnp.exp(log_l2) * w**2),
    lambda w, log_l2, batch: error(w, batch),
)
start = jnp.full(30, -3.0)

# %% [markdown]
# ## 1. What every hypergradient says of itself
#
# `error_estimate` is relative. Here against the truth, for budgets from one product with the Hessian to sixteen.

# %%
tight = hg.implicit(problem, inner=hg.inner.newton(tol=1e-12), linear=hg.linear.dense())
exact, _ = jax.jit(tight.hypergrad)(tight.init(jnp.zeros(30), start), start, train, valid)
found = []
for steps in (1, 2, 4, 8, 16):
    solver = hg.implicit(problem, linear=hg.linear.cg(max_steps=steps, indefinite="truncate"))
    out, _ = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(30), start), start, train, valid)
    true = float(jnp.linalg.norm(out.grad - exact.grad) / jnp.linalg.norm(exact.grad))
    found.append((steps, true, float(out.info.error_estimate)))
    print(f"{steps:3} products: true error {true:.1e}, estimated {found[-1][2]:.1e}")

# %% [markdown]
# ## 2. hg.check: finite differences of the whole problem, solved again
#
# A right solver, and one that is off by a factor of two.

# %%
print(hg.check(hg.implicit(problem), jnp.zeros(30), start, train, valid))

# %%
right = hg.implicit(problem)


def twice(*args, **options):
    out, state = right.hypergrad(*args, **options)
    return out._replace(grad=2 * out.grad), state


doubled = hg.Solver(
    right.init,
    twice,
    right.response,
)
print(hg.check(doubled, jnp.zeros(30), start, train, valid))

# %% [markdown]
# ## 3. Did tuning help?
#
# Thirty penalties on sixty validation rows. `test=` is evaluated once, at the end; here every step is looked at
# in hindsight, which is for this page only.

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tune warns of many hyperparameters for few rows, which is what this shows
    result = hg.tune(
        hg.implicit(problem),
        jnp.zeros(30),
        start,
        train,
        valid,
        test=test,
        outer=optax.adam(0.3),
        steps=80,
        progress=False,
    )
print(result)
w_star = hg.best_response(problem)
unseen = jax.jit(lambda log_l2: error(w_star(log_l2, jnp.zeros(30), train), test))
steps = np.arange(0, len(result.history.value), 4)
hindsight = [float(unseen(result.history.hparams[i])) for i in steps]
grid = [jnp.full(30, value) for value in np.linspace(-8, 1, 19)]
on_valid = jax.jit(lambda log_l2: error(w_star(log_l2, jnp.zeros(30), train), valid))
one = min(grid, key=lambda log_l2: float(on_valid(log_l2)))
print(f"one penalty by grid: validation {float(on_valid(one)):.3f}, test {float(unseen(one)):.3f}")
print(f"thirty, tuned:       validation {result.best.value:.3f}, test {result.test:.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
products, true, estimated = zip(*found, strict=True)
axes[0].loglog(products, true, "o-", color="#0072B2", label="true error")
axes[0].loglog(products, np.where(np.isfinite(estimated), estimated, np.nan), "s--", color="#D55E00", label="estimated")
axes[0].set(xlabel="products with the Hessian", ylabel="relative error", title="is it right")
axes[1].plot(result.history.value, color="#0072B2", label="validation, tuned by")
axes[1].plot(steps, hindsight, color="#D55E00", label="test, in hindsight")
axes[1].axhline(float(unseen(one)), color="#222222", linewidth=1, linestyle="--", label="test, one penalty by grid")
axes[1].set(xlabel="outer step", ylabel="log loss", title="did it help", ylim=(0, None))
for ax in axes:
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# The validation loss falls to the end: it is what the penalties were moved by. The test loss turns where they
# begin to fit those sixty rows. Fewer hyperparameters (groups of features), more validation rows
# ([folds](cross_validation.ipynb)), a bounded domain and an early stop (`patience=`) all help; keeping a test set
# apart is how one knows.
