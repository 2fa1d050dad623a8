"""Which pre-training tasks help? Task weights by implicit differentiation through fine-tuning.

    python experiments/meta_pretraining/run.py --seed 0 --json

An encoder is pre-trained on 10 tasks about digits and 30 whose labels are noise, then frozen and fine-tuned on
60 labels. The hypergradient goes through the fine-tuning by plain differentiation of its steps, and from there through
the optimum of the pre-training by the implicit function theorem.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments._common import experiment, progress
from experiments._data import digits
from experiments._figures import BLUE, GREEN, INK, ORANGE, PINK, bars, figure, save, titled

RELEVANT, NOISE, HIDDEN = 10, 30, 16
FINE_TUNING, RATE = 20, 1.0  # steps and learning rate of the head
PRETRAINING = 600  # steps of each run from scratch
BLUR, DECAY = (0.01, 1.0), (1e-5, 1e-1)  # what the search tries; tuning starts at the geometric means
INNER = 10  # steps of the pre-training between two hypergradients


class Data(NamedTuple):
    """Pre-training pixels and one ±1 label a task [n, tasks]; labelled parts as (x, y)."""

    pretrain: tuple[Any, Any]
    tune: Any
    valid: Any
    test: Any


def load(seed: int) -> Data:
    (x, y), tune, valid, test = digits(seed, (600, 60, 300))
    relevant = np.where(y[:, None] == np.arange(RELEVANT)[None], 1.0, -1.0)
    noise = np.random.default_rng(seed).choice([-1.0, 1.0], (len(y), NOISE))
    return Data((x, np.concatenate([relevant, noise], 1).astype(np.float32)), tune, valid, test)


def encode(encoder: dict[str, Any], x: Any) -> Any:
    return jnp.tanh(x @ encoder["w"] + encoder["b"][None])


def start(key: Any) -> dict[str, Any]:
    w, v = jax.random.split(key)
    return {
        "encoder": {"w": 0.2 * jax.random.normal(w, (64, HIDDEN)), "b": jnp.zeros(HIDDEN)},
        "heads": 0.1 * jax.random.normal(v, (HIDDEN, RELEVANT + NOISE)),
    }


def pretraining_loss(params: dict[str, Any], hparams: dict[str, Any], batch: Any, key: Any) -> Any:
    """Mean logistic loss of the tasks by weight, of pixels with noise added, with weight decay."""
    x, signs = batch
    x = x + hparams["blur"] * jax.random.normal(key, x.shape)
    losses = jnp.mean(jax.nn.softplus(-signs * (encode(params["encoder"], x) @ params["heads"])), 0)
    penalty = hparams["decay"] * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
    return jnp.mean(share(hparams["weights"]) * losses) + penalty


def share(weights: Any) -> Any:
    """Weights of mean 1, so that their size is not a weight decay in disguise."""
    return weights / jnp.mean(weights)


def fine_tune(encoder: dict[str, Any], data: Any) -> dict[str, Any]:
    """A new head on the frozen encoder by gradient descent from zero."""
    features, labels = encode(encoder, data[0]), data[1]

    def step(head: dict[str, Any], _: None) -> Any:
        slope = jax.grad(cross_entropy)(head, features, labels)
        return jax.tree.map(lambda p, g: p - RATE * g, head, slope), None

    head = {"w": jnp.zeros((HIDDEN, 10)), "b": jnp.zeros(10)}
    return jax.lax.scan(step, head, None, length=FINE_TUNING)[0]


def cross_entropy(head: dict[str, Any], features: Any, labels: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(features @ head["w"] + head["b"][None], labels))


def after_fine_tuning(params: dict[str, Any], hparams: Any, batch: Any) -> Any:
    """Validation loss of the fine-tuned model: the outer loss differentiates through all of its steps."""
    tune, (x, y) = batch
    return cross_entropy(fine_tune(params["encoder"], tune), encode(params["encoder"], x), y)


@functools.partial(jax.jit, static_argnames="steps")
def pretrain(hparams: dict[str, Any], params: Any, data: Any, key: Any, *, steps: int) -> Any:
    """A run from scratch."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry: Any, key: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(jax.grad(pretraining_loss)(params, hparams, data, key), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]


@jax.jit
def accuracy(encoder: Any, tune: Any, test: Any) -> Any:
    head = fine_tune(encoder, tune)
    return jnp.mean(jnp.argmax(encode(encoder, test[0]) @ head["w"] + head["b"][None], 1) == test[1])


def measure(options: Any, numbers: dict[str, Any]) -> None:
    steps, repeats, draws = (3, 1, 2) if options.smoke else (200, 3, 12)
    again = functools.partial(pretrain, steps=PRETRAINING // 6 if options.smoke else PRETRAINING)
    data = load(options.seed)
    keys = jax.random.split(jax.random.key(options.seed), 3)
    uniform = {
        "weights": jnp.ones(RELEVANT + NOISE),
        "blur": jnp.float32(np.sqrt(BLUR[0] * BLUR[1])),
        "decay": jnp.float32(np.sqrt(DECAY[0] * DECAY[1])),
    }
    oracle = {"weights": jnp.where(jnp.arange(RELEVANT + NOISE) < RELEVANT, 1.0, 1e-6)}

    def retrained(hparams: dict[str, Any]) -> float:
        """Test accuracy after pre-training from scratch, from starts that no tuning has seen."""
        fresh = jax.random.split(jax.random.fold_in(keys[0], 1), (repeats, 2))
        found = (again(hparams, start(key[0]), data.pretrain, key[1]) for key in fresh)
        return float(np.mean([accuracy(params["encoder"], data.tune, data.test) for params in found]))

    began = pretrain(uniform, start(keys[0]), data.pretrain, keys[1], steps=PRETRAINING)
    random = accuracy(start(keys[0])["encoder"], data.tune, data.test)
    numbers["no_pretraining"], numbers["uniform"] = random, retrained(uniform)

    rng, tried = np.random.default_rng(options.seed), []
    for _ in progress(range(draws), "search"):
        blur, decay = (np.float32(np.exp(rng.uniform(*np.log(box)))) for box in (BLUR, DECAY))
        hparams = uniform | {"blur": jnp.asarray(blur), "decay": jnp.asarray(decay)}
        params = again(hparams, start(keys[0]), data.pretrain, keys[1])
        tried.append((float(after_fine_tuning(params, hparams, (data.tune, data.valid))), hparams))
    searched = min(tried, key=lambda pair: pair[0])[1]
    numbers["searched"] = retrained(searched)
    numbers["searched_oracle"] = retrained(searched | oracle)

    problem = hg.Problem(pretraining_loss, after_fine_tuning)
    inner = hg.inner.gradient(optax.adam(1e-2), steps=INNER)
    linears = {
        "k0": hg.linear.identity(step_size=1.0),
        "k5": hg.linear.neumann(5, step_size=1.0),
        "cg": hg.linear.cg(max_steps=10),
    }
    if options.smoke:
        linears = {"cg": linears["cg"]}
    results = {}
    for name, linear in linears.items():
        result = results[name] = hg.tune(
            hg.implicit(problem, inner=inner, linear=linear),
            began,
            uniform,
            data.pretrain,
            (data.tune, data.valid),
            outer=optax.adam(0.05),
            steps=steps,
            key=keys[2],
            domain={"weights": hg.domains.interval(0, 2), "blur": hg.domains.log(), "decay": hg.domains.log()},
        )
        weights = np.asarray(share(result.hparams["weights"]))
        numbers[name] = {
            "weight_gap": weights[:RELEVANT].mean() - weights[RELEVANT:].mean(),
            "relevant": weights[:RELEVANT].mean(),
            "noise": weights[RELEVANT:].mean(),
            "least_relevant": weights[:RELEVANT].min(),
            "most_noise": weights[RELEVANT:].max(),
            "online": accuracy(result.params["encoder"], data.tune, data.test),
            "retrained": retrained(result.hparams),
            "weights_alone": retrained(uniform | {"weights": result.hparams["weights"]}),
            "blur": result.hparams["blur"],
            "decay": result.hparams["decay"],
            "skipped": int(np.sum(~result.history.usable)),
        }
    numbers["oracle"] = retrained(results["cg"].hparams | oracle)
    numbers["gain"] = numbers["cg"]["retrained"] - numbers["uniform"]
    numbers["gain_over_search"] = numbers["cg"]["retrained"] - numbers["searched"]
    picture(numbers, results, options.out)


def picture(numbers: dict[str, Any], results: dict[str, hg.Result], folder: Path) -> None:
    canvas = figure(12.5, 4.2)
    left, middle, right = canvas.subplots(1, 3, width_ratios=(1.1, 1, 1))
    history = results["cg"].history.hparams["weights"]
    history = history / history.mean(1, keepdims=True)
    left.plot(history[:, RELEVANT:], color=ORANGE, linewidth=0.8, alpha=0.6)
    left.plot(history[:, :RELEVANT], color=BLUE, linewidth=1.4)
    left.text(0.97, 0.55, "tasks about digits", color=BLUE, transform=left.transAxes, ha="right", fontweight="bold")
    left.text(0.97, 0.36, "tasks of noise", color=ORANGE, transform=left.transAxes, ha="right", fontweight="bold")
    titled(left, "Tasks of noise lose their weight", xlabel="outer step", ylabel="weight of a task (mean 1)")
    texts = {"k0": ("identity (T1-T2)", PINK), "k5": ("Neumann, 5 terms", GREEN), "cg": ("CG, 10 steps", BLUE)}
    for name, result in results.items():
        text, color = texts[name]
        middle.plot(result.history.value, color=color, label=text)
    middle.legend(frameon=False, fontsize=9)
    titled(middle, "What it is for", xlabel="outer step", ylabel="validation loss after fine-tuning")
    rows = {
        "no pre-training": (numbers["no_pretraining"], INK),
        "all tasks alike": (numbers["uniform"], ORANGE),
        "…, noise and decay searched": (numbers["searched"], GREEN),
        "tuned": (numbers["cg"]["retrained"], BLUE),
        "relevant tasks only": (numbers["oracle"], PINK),
    }
    label = "test accuracy after fine-tuning on 60 labels"
    bars(right, rows, "Retrained from scratch", xlabel=label, xlim=(0.6, 1.0))
    save(canvas, folder, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Weight of a task (mean 1)",
            "learned weight, mean over the tasks",
            {
                "digits: identity (T1-T2)": ("k0.relevant", style.PINK),
                "… Neumann, 5 terms": ("k5.relevant", style.GREEN),
                "… CG, 10 steps": ("cg.relevant", style.BLUE),
                "noise: identity (T1-T2)": ("k0.noise", style.PINK),
                "… Neumann, 5 terms ": ("k5.noise", style.GREEN),
                "… CG, 10 steps ": ("cg.noise", style.BLUE),
            },
        ),
        (
            "Retrained, then fine-tuned on 60 labels",
            "test accuracy",
            {
                "no pre-training": ("no_pretraining", style.INK),
                "all tasks alike": ("uniform", style.ORANGE),
                "…, noise and decay searched": ("searched", style.GREEN),
                "tuned, T1-T2": ("k0.retrained", style.BLUE),
                "tuned, Neumann": ("k5.retrained", style.BLUE),
                "tuned, CG": ("cg.retrained", style.BLUE),
                "relevant tasks only": ("oracle", style.PINK),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)
