"""Which training data are worth how much for a target? Weights of sources, of passages, of annotators, of pairs.

    python experiments/data_selection/run.py --seed 0 --json

A model of the next character is trained on text from eight sources for a ninth, of which little is given; a model of
preferences is trained on pairs judged by six annotators of different care. Weights of the training data are learned
by implicit differentiation, and compared with importance resampling, filters and search.
"""

from __future__ import annotations

import argparse
import ast
import html.entities
import importlib
import io
import re
import sys
import tokenize
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments import _figures as style
from experiments._common import experiment
from experiments._data import digits, documentation
from experiments._figures import BLUE, DASHED, INK, ORANGE, PINK, figure, titled

ALPHABET = " abcdefghijklmnopqrstuvwxyz0\n.,:;()_='"
PASSAGE = 80  # characters
MODULES = ("argparse", "datetime", "ipaddress", "turtle")
NOISE = (0.05, 0.1, 0.2, 0.4, 0.5, 0.8)  # share of preferences that each annotator flips
NGRAMS = 1000  # buckets into which importance resampling hashes characters and pairs of them
KEPT = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # shares of the passages that it may keep


class Task(NamedTuple):
    """Training data of many sources, and a little of what is wanted.

    Attributes:
        losses: `(params, data) -> [n]`, one an example.
        params: where every fit begins.
        decay: of the squared parameters.
        train, valid, test: examples along the first axis.
        source: which one each training example is from.
    """

    losses: Callable[[Any, Any], jax.Array]
    params: Any
    decay: float
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    source: np.ndarray


def sources() -> dict[str, str]:
    """Text that comes with Python, numpy and scikit-learn."""
    files = [Path(importlib.import_module(name).__file__ or "").read_text(encoding="utf-8") for name in MODULES]
    trees = [ast.parse(text) for text in files]
    nodes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    described = [n for n in nodes if ast.get_docstring(n)]
    docstrings = "\n".join(ast.get_docstring(n) or "" for n in described)
    for node in described:
        node.body = node.body[1:]
    tokens = (t for text in files for t in tokenize.generate_tokens(io.StringIO(text).readline))
    folder = Path(importlib.import_module("sklearn").__file__ or "").parent / "datasets" / "descr"
    return {
        "docstrings of modules": docstrings,
        "comments": "\n".join(t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT),
        "code": "\n".join(ast.unparse(tree) for tree in trees),
        "descriptions of data": "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst"))),
        "docstrings of numpy": "\n".join(f.__doc__ or "" for _, f in sorted(vars(np).items()) if callable(f)),
        "names of characters": "\n".join(unicodedata.name(chr(code), "") for code in range(0x2000)),
        "names of entities": "\n".join(f"{name}: {ord(c[0]):#x}" for name, c in html.entities.html5.items()),
        "syntax trees": "\n".join(ast.dump(tree, indent=0) for tree in trees[:2]),
    }


def encode(text: str) -> np.ndarray:
    """Letters in lower case, digits as 0, spaces once; other characters are left out."""
    index = {c: i for i, c in enumerate(ALPHABET)} | dict.fromkeys("123456789", ALPHABET.index("0"))
    return np.asarray([index[c] for c in re.sub(" +", " ", text.lower()) if c in index], np.int32)


def passages(codes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` passages that do not overlap, in random order."""
    whole = codes[: len(codes) // PASSAGE * PASSAGE].reshape(-1, PASSAGE)
    return whole[rng.permutation(len(whole))[:count]]


def text_task(seed: int, count: int) -> Task:
    """The target is Python's language reference; 50 passages of it are given."""
    rng = np.random.default_rng(seed)
    codes, alphabet = documentation()
    target = passages(encode("".join(alphabet[c] for c in codes)), 12 * count, rng)
    parts = [passages(encode(text), count, rng) for text in sources().values()]
    size = len(ALPHABET)
    params = {"bias": jnp.zeros(size), "last": jnp.zeros((size, size)), "second_last": jnp.zeros((size, size))}
    valid, test = target[: count // 2], target[count:]
    return Task(next_character, params, 1e-5, np.concatenate(parts), valid, test, labels(map(len, parts)))


def labels(sizes: Any) -> np.ndarray:
    return np.concatenate([np.full(size, i) for i, size in enumerate(sizes)])


def next_character(params: Any, text: Any) -> jax.Array:
    """Bits per character of each passage, from a log-linear model of the two characters before."""
    logits = params["bias"] + params["last"][:, None] + params["second_last"][None]
    table = -jax.nn.log_softmax(logits) / np.log(2)
    return jnp.mean(table[text[:, 1:-1], text[:, :-2], text[:, 2:]], axis=1)


def pairs_task(seed: int, count: int) -> tuple[Task, np.ndarray]:
    """The larger of two digits is preferred; also which preferences of the annotators are flipped."""
    rng = np.random.default_rng(seed)
    parts = digits(seed, (700, 300))
    train, valid, test = (pairs(part, n, rng) for part, n in zip(parts, (count, count // 10, 2000), strict=True))
    annotator = rng.integers(len(NOISE), size=len(train))
    flipped = rng.random(len(train)) < np.asarray(NOISE)[annotator]
    train = np.where(flipped[:, None], -train, train)
    return Task(preference, jnp.zeros(64), 1e-3, train, valid, test, annotator), flipped


def pairs(part: tuple[np.ndarray, np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """Pixels of the larger digit less those of the smaller, [count, 64]."""
    x, y = part
    a, b = rng.integers(len(y), size=(2, 4 * count))
    a, b = a[y[a] > y[b]][:count], b[y[a] > y[b]][:count]
    return x[a] - x[b]


def preference(params: Any, difference: Any) -> jax.Array:
    """Negative log-likelihood of each preference by Bradley and Terry, with a linear reward."""
    return jax.nn.softplus(-difference @ params)


class Study:
    """Fits of a task at given weights, and weights that are tuned.

    Every fit sees training and validation examples together; the weights say which of them count.
    """

    def __init__(self, task: Task, *, short: bool) -> None:
        self.task = task
        problem = hg.Problem(
            lambda params, weights, batch: self.loss(params, weights[batch[1]], batch[0]),
            lambda params, weights, data: jnp.mean(task.losses(params, data)),
        )
        steps, tol = (50, 0.5) if short else (500, 1e-3)
        inner = hg.inner.gradient(optax.adam(0.1), steps=steps, tol=tol)
        self.solver = hg.implicit(problem, inner=inner, linear=hg.linear.cg(tol=1e-2, max_steps=100))
        self.fitted = jax.jit(hg.best_response(problem, inner=inner))
        self.loss_on = jax.jit(problem.outer_loss)

    def loss(self, params: Any, weights: Any, data: Any) -> jax.Array:
        """Mean by weight, with weight decay."""
        squares = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        return jnp.sum(weights * self.task.losses(params, data)) / jnp.sum(weights) + self.task.decay * squares

    def fit(self, weights: Any, valid: float = 0.0) -> Any:
        """Parameters from scratch, at a weight for each training example and one for those of validation."""
        task = self.task
        weights = np.concatenate([weights, np.full(len(task.valid), valid)]).astype(np.float32)
        data = np.concatenate([task.train, task.valid])
        return self.fitted(jnp.asarray(weights), task.params, (data, np.arange(len(data))))

    def valid_loss(self, weights: Any) -> float:
        return float(self.loss_on(self.fit(weights), None, self.task.valid))

    def scores(self, weights: Any) -> dict[str, float]:
        """Target loss of a fresh fit on the training examples alone, and with those of validation beside them."""
        fits = {"retrained": self.fit(weights), "with_valid": self.fit(weights, 1.0)}
        return {name: float(self.loss_on(params, None, self.task.test)) for name, params in fits.items()}

    def tune(self, groups: np.ndarray, steps: int) -> hg.Result:
        """A weight in [0, 1] for each group of training examples; there are no more groups than examples."""
        return hg.tune(
            self.solver,
            self.task.params,
            jnp.full(len(groups), 0.5),  # of one shape, so that one compiled program serves all
            (self.task.train, groups),
            self.task.valid,
            outer=optax.adam(0.2),
            steps=steps,
            domain=hg.domains.interval(0, 1),
        )


def resampled(task: Task, share: float, rng: np.random.Generator) -> np.ndarray:
    """Passages that importance resampling keeps (1) by how likely target and sources make their n-grams."""

    def features(text: np.ndarray) -> np.ndarray:
        grams = np.concatenate([text, text[:, :-1] * 7919 + text[:, 1:] * 104729 + 1], axis=1) % NGRAMS
        return np.stack([np.bincount(row, minlength=NGRAMS) for row in grams])

    wanted, given = features(task.valid), features(task.train)
    logs = [np.log((f.sum(0) + 1) / (f.sum() + NGRAMS)) for f in (wanted, given)]
    scores = given @ (logs[0] - logs[1]) + rng.gumbel(size=len(given))
    return scores >= np.quantile(scores, 1 - share)


def searched(study: Study, draws: int, rng: np.random.Generator) -> np.ndarray:
    """The best of so many weights of the sources, drawn evenly from those of sum 1."""
    tried = [rng.dirichlet(np.ones(study.task.source.max() + 1))[study.task.source] for _ in range(draws)]
    return min(tried, key=study.valid_loss)


def select_text(seed: int, count: int, steps: int, *, short: bool) -> tuple[dict[str, Any], dict[str, hg.Result]]:
    task, rng = text_task(seed, count), np.random.default_rng(seed)
    study, each = Study(task, short=short), np.arange(len(task.train))
    results = {"sources": study.tune(task.source, steps), "passages": study.tune(each, steps)}
    history = results["sources"].history
    draws = int(np.sum(history.inner_steps + 2 * history.linear_steps) // history.inner_steps[0])
    alone = [(task.source == i).astype(float) for i in range(task.source.max() + 1)]
    chosen = {
        "uniform": np.ones(len(each)),
        "best_source": min(alone, key=study.valid_loss),
        "resampled": min((resampled(task, share, rng) for share in KEPT), key=study.valid_loss),
        "searched": searched(study, draws, rng),
        "sources": np.asarray(results["sources"].best.hparams)[task.source],
        "passages": np.asarray(results["passages"].best.hparams),
    }
    found: dict[str, Any] = {name: study.scores(weights) for name, weights in chosen.items()}
    found["target_alone"] = float(study.loss_on(study.fit(0 * each, 1.0), None, task.test))
    for name, result in results.items():
        found[name] |= {
            "online": float(study.loss_on(result.best.params, None, task.test)),
            "valid": result.best.value,
            "skipped": int(np.sum(~result.history.usable)),
        }
    found["draws"], found["kept"] = draws, np.mean(chosen["resampled"])
    found["gain"] = found["uniform"]["retrained"] - found["sources"]["retrained"]
    for name in results:
        found[f"{name}_over_resampling"] = found["resampled"]["retrained"] - found[name]["retrained"]
    return found, results


def select_pairs(seed: int, count: int, steps: int, *, short: bool) -> tuple[dict[str, Any], dict[str, hg.Result]]:
    task, flipped = pairs_task(seed, count)
    study, each = Study(task, short=short), np.arange(len(task.train))
    results = {"annotators": study.tune(task.source, steps), "pairs": study.tune(each, steps)}
    clean = study.fit(0 * each, 1.0)
    agrees = np.asarray(task.train @ clean) > 0
    rate = np.asarray([np.mean(agrees[task.source == i]) for i in range(len(NOISE))])
    chosen = {
        "uniform": np.ones(len(each)),
        "filtered": agrees.astype(float),
        "agreement": np.maximum(np.log(rate / (1 - rate)), 0)[task.source],
        "annotators": np.asarray(results["annotators"].best.hparams)[task.source],
        "pairs": np.asarray(results["pairs"].best.hparams),
        "oracle": 1.0 - flipped,
    }
    right = lambda params: float(np.mean(np.asarray(task.test @ params) > 0))
    found: dict[str, Any] = {
        name: study.scores(weights) | {"accuracy": right(study.fit(weights))} for name, weights in chosen.items()
    }
    found["target_alone"] = float(study.loss_on(clean, None, task.test))
    found["target_alone_accuracy"] = right(clean)
    found["gain"] = found["uniform"]["retrained"] - found["annotators"]["retrained"]
    found["skipped"] = {name: int(np.sum(~result.history.usable)) for name, result in results.items()}
    return found, results


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    count, pairs, steps = (20, 120, 2) if options.smoke else (100, 1500, 100)
    numbers["text"], texts = select_text(options.seed, count, steps, short=options.smoke)
    numbers["preferences"], judged = select_pairs(options.seed, pairs, steps, short=options.smoke)
    names = [name.replace(" ", "_") for name in sources()]
    numbers["source_weights"] = dict(zip(names, np.asarray(texts["sources"].best.hparams), strict=False))
    numbers["annotator_weights"] = np.asarray(judged["annotators"].best.hparams)[: len(NOISE)]


def drawing(results: dict[str, Any]) -> Any:
    canvas = figure(14.5, 4.6)
    left, middle, right = canvas.subplots(1, 3, width_ratios=(1, 1, 0.9))
    weights = {
        name: style.each(results, f"source_weights.{name}") for name in next(iter(results.values()))["source_weights"]
    }
    order = sorted(weights, key=lambda name: -float(np.mean(weights[name])))
    rows = {name.replace("_", " "): (weights[name], BLUE) for name in order}
    style.over_seeds(left, rows, "Source weights", xlabel="learned weight", xlim=(-0.05, 1.05), digits=2)
    arms = {
        "all alike": ("uniform.retrained", ORANGE),
        "target's own 50 alone": ("target_alone", INK),
        "best source alone": ("best_source.retrained", INK),
        "weights by search": ("searched.retrained", PINK),
        "resampled": ("resampled.retrained", PINK),
        "source weights": ("sources.retrained", BLUE),
        "passage weights": ("passages.retrained", BLUE),
    }
    found = {name: (style.each(results, f"text.{key}"), color) for name, (key, color) in arms.items()}
    style.over_seeds(middle, found, "Retrained, on new text", xlabel="bits per character", digits=2)
    for i, found in enumerate(style.each(results, "annotator_weights")):
        label = "a line for each seed" if i == 0 else None
        right.plot(NOISE, found, "o-", color=BLUE, markersize=6, linewidth=0.8, alpha=0.7, label=label)
    right.axvline(0.5, color=INK, linewidth=0.9, linestyle=DASHED)
    right.text(0.52, 0.72, "as good\nas a coin", color=INK, fontsize=11, transform=right.get_xaxis_transform())
    titled(right, "Annotators by their care", xlabel="share of preferences flipped", ylabel="learned weight")
    right.set_ylim(-0.04, 1.1)
    return canvas


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)
