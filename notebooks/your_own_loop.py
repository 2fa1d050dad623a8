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
# # Your own loop: jit, vmap, a mesh, and resume
#
# A solver is three pure functions: `init`, `hypergrad`, `response`. Whatever JAX does with a function it does
# with these.

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
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_diabetes

import hypergrad as hg

x, y = load_diabetes(return_X_y=True, scaled=False)
x, y = jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32), jnp.asarray((y - y.mean()) / y.std(), jnp.float32)
train, valid = (x[:200], y[:200]), (x[200:], y[200:])


def error(w, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


problem = hg.Problem(
    lambda w, log_l2, batch: error(w, batch) + jnp.sum(jnp.exp(log_l2) * w**2), lambda w, log_l2, batch: error(w, batch)
)
solver = hg.implicit(problem)

# %% [markdown]
# ## A loop of five lines
#
# `state` carries what the next call starts from: parameters and adjoint. Look at the status before you use a
# gradient.

# %%
hypergrad = jax.jit(solver.hypergrad)
optimizer = optax.adam(0.1)
log_l2 = jnp.full(10, -3.0)
state, moments = solver.init(jnp.zeros(10), log_l2), optimizer.init(log_l2)
values = []
for _ in range(60):
    out, state = hypergrad(state, log_l2, train, valid)
    hg.raise_if_failed(out)
    updates, moments = optimizer.update(out.grad, moments)
    log_l2 = optax.apply_updates(log_l2, updates)
    values.append(float(out.value))
print(f"validation {values[0]:.4f} -> {values[-1]:.4f}; estimated error {float(out.info.error_estimate):.1e}")

# %% [markdown]
# ## Eight starts at once, under vmap
#
# A start that fails has a status of its own, and changes no bit of the others.

# %%
starts = jnp.linspace(-6, 1, 8)[:, None] * jnp.ones((8, 10))


@jax.jit
def step(state, log_l2, moments):
    out, state = jax.vmap(solver.hypergrad, (0, 0, None, None))(state, log_l2, train, valid)
    updates, moments = optimizer.update(out.grad, moments)
    return state, optax.apply_updates(log_l2, updates), moments, out.value


many = jax.vmap(lambda h: solver.init(jnp.zeros(10), h))(starts)
hparams, moments, curves = starts, optimizer.init(starts), []
for _ in range(60):
    many, hparams, moments, value = step(many, hparams, moments)
    curves.append(value)
figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
ax.plot(np.stack(curves), color="#0072B2", alpha=0.6)
ax.plot(values, color="#D55E00", label="the loop above")
ax.set(xlabel="outer step", ylabel="validation error", title="eight starts, one program")
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## On a mesh
#
# Shard the rows, and the same call runs on all devices; here on those that this machine has.

# %%
mesh = jax.sharding.Mesh(jax.devices(), ("rows",))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
even = len(train[1]) // len(jax.devices()) * len(jax.devices())
sharded = jax.device_put((train[0][:even], train[1][:even]), rows)
out, _ = hypergrad(solver.init(jnp.zeros(10), log_l2), log_l2, sharded, valid)
single, _ = hypergrad(solver.init(jnp.zeros(10), log_l2), log_l2, (train[0][:even], train[1][:even]), valid)
print(len(jax.devices()), "device(s); largest difference", float(jnp.abs(out.grad - single.grad).max()))

# %% [markdown]
# ## Stop, and go on to the bit
#
# `hg.tune` with a folder goes on where it stood when the same call is made again.


# %%
def tune(steps, **options):
    return hg.tune(
        solver,
        jnp.zeros(10),
        jnp.full(10, -3.0),
        train,
        valid,
        outer=optax.adam(0.1),
        steps=steps,
        progress=False,
        **options,
    )


folder = tempfile.mkdtemp()
tune(15, checkpoint=folder, every=5)  # stopped here, by whatever
resumed, whole = tune(30, checkpoint=folder, every=5), tune(30)
print("same bits:", bool(jnp.all(resumed.hparams == whole.hparams)))
