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
# # Reweighting examples with wrong labels
#
# Half of 300 labels are wrong. One weight per example, tuned so that training on the weighted examples does well
# on a small clean set, finds most of them. That is not the whole story, and the rest is at the end of this page.

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

images, labels = load_digits(return_X_y=True)
rng = np.random.default_rng(0)
order = rng.permutation(len(labels))
x, y = (images[order] / 16).astype(np.float32), labels[order]
wrong = np.arange(300) % 2 == 0
noisy = np.where(wrong, (y[:300] + rng.integers(1, 10, 300)) % 10, y[:300])
train, clean, test = (x[:300], noisy), (x[300:500], y[300:500]), (x[500:], y[500:])

# %% [markdown]
# ## One weight per example, between 0 and 1


# %%
def losses(params, batch):
    logits = batch[0] @ params["w"] + params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])


def inner_loss(params, weights, batch):
    decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    return jnp.sum(weights * losses(params, batch)) / jnp.sum(weights) + 3e-3 * decay


problem = hg.Problem(inner_loss, lambda params, weights, batch: jnp.mean(losses(params, batch)))
zero = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
result = hg.tune(
    hg.implicit(problem),
    zero,
    jnp.full(300, 0.5),
    train,
    clean,
    test=test,
    domain=hg.domains.interval(0, 1),
    outer=optax.adam(0.1),
    steps=80,
    progress=False,
)
weights = np.asarray(result.best.hparams)
print(result)
caught, suspected = np.mean(weights[wrong] < 0.5), np.mean(weights[~wrong] < 0.5)
print(f"weights below 0.5: {caught:.0%} of the wrong labels, {suspected:.0%} of the right ones")

# %%
figure = plt.figure(figsize=(11, 3.6), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
ax = left.subplots()
ax.hist([weights[~wrong], weights[wrong]], 20, color=["#0072B2", "#D55E00"], label=["right label", "wrong label"])
ax.set(xlabel="weight learned", ylabel="training examples")
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
for ax, i in zip(right.subplots(2, 6).flat, np.argsort(weights), strict=False):
    ax.imshow(x[i].reshape(8, 8), cmap="gray_r")
    ax.set_title(f"“{noisy[i]}” is {y[i]}", fontsize=9, color="#D55E00" if wrong[i] else "#0072B2")
    ax.axis("off")

# %% [markdown]
# ## Did it help?
#
# Every rival is trained to the optimum of the same loss; the last two need no tuning at all.

# %%
fit = jax.jit(lambda weights, batch: hg.best_response(problem)(weights, zero, batch))


def accuracy(params):
    return float(jnp.mean(jnp.argmax(test[0] @ params["w"] + params["b"], axis=1) == test[1]))


both = tuple(np.concatenate(pair) for pair in zip(train, clean, strict=True))
# A filter: does a model of the clean examples agree with the label?
agree = np.argmax(train[0] @ np.asarray(fit(jnp.ones(200), clean)["w"]), axis=1) == noisy
rivals = {
    "all noisy labels": (jnp.ones(300), train),
    "noisy, weighted": (jnp.asarray(weights), train),
    "noisy, weighted, and the clean": (jnp.concatenate([weights, jnp.ones(200)]), both),
    "the clean alone": (jnp.ones(200), clean),
    "filter without tuning, and the clean": (jnp.concatenate([jnp.asarray(agree, jnp.float32), jnp.ones(200)]), both),
}
for name, (w, batch) in rivals.items():
    print(f"{name:37} test accuracy {accuracy(fit(w, batch)):.3f}")

# %% [markdown]
# Weights repair the training set. But where there are enough clean examples to tune by, training on these alone
# is a serious rival, and a filter that asks whether a clean model agrees with a label is another. Look at both
# before you tune weights; [the experiment](../experiments/hyper_cleaning/README.md) has the same finding on more
# noise and more seeds.
