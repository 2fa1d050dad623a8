"""A hypernetwork with one embedding for each task learns five tasks one after the other; what is left of the first?

Split digits: 0 against 1, then 2 against 3, and so on. The library's perceptron from hyperparameters to parameters
(`hg.responses.mlp`) makes the network of a task from its embedding, which is learned with it; while a later task is
learned, a penalty holds the networks that it makes of earlier embeddings where they were. Rivals: no penalty, plain
fine-tuning of a network with a head for each task, one network for each task, and replay of earlier rows in as much
memory.

    python experiments/task_embeddings/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment  # noqa: E402
from experiments._data import digits  # noqa: E402

TASKS, HIDDEN, BATCH, STEPS, RATE = 5, 16, 32, 1000, 1e-3
EMBEDDING, LAYERS = 4, (32, 8)
BETAS = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0)
WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of what is replayed
CLASSES = {"split": 2, "permuted": 10}


def split_digits(seed: int, sizes: tuple[int, int]) -> list[tuple[Any, Any]]:
    """Training, validation and test rows of all tasks, as many of each: `(x [task, n, 64], y [task, n])`."""
    found = []
    for x, y in digits(seed, sizes):
        tasks = [y // 2 == t for t in range(TASKS)]
        n = min(int(np.sum(rows)) for rows in tasks)
        pick = [np.flatnonzero(rows)[:n] for rows in tasks]
        found.append((jnp.asarray([x[rows] for rows in pick]), jnp.asarray([y[rows] % 2 for rows in pick])))
    return found


def permuted_digits(seed: int, sizes: tuple[int, int]) -> list[tuple[Any, Any]]:
    """All ten digits in every task, with the pixels in an order of its own; the first keeps theirs."""
    rng = np.random.default_rng(seed)
    orders = [np.arange(64), *(rng.permutation(64) for _ in range(TASKS - 1))]
    stack = lambda x, y: (jnp.asarray([x[:, order] for order in orders]), jnp.asarray([y] * TASKS))
    return [stack(*part) for part in digits(seed, sizes)]


def new_network(key: Any, outputs: int) -> dict[str, Any]:
    keys = jax.random.split(key)
    return {
        "w1": jax.random.normal(keys[0], (64, HIDDEN)) * np.sqrt(2 / 64),
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(keys[1], (HIDDEN, outputs)) / np.sqrt(HIDDEN),
        "b2": jnp.zeros(outputs),
    }


def network(w: Any, x: Any) -> Any:
    return jax.nn.relu(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]


def of_task(w: Any, t: Any, x: Any) -> Any:
    """The outputs of a task, of a network with a head for each."""
    outputs = network(w, x)
    n = outputs.shape[-1] // TASKS
    return jax.lax.dynamic_slice_in_dim(outputs, n * t, n, axis=-1)


def cross_entropy(outputs: Any, y: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, y))


def accuracy(outputs: Any, y: Any) -> Any:
    return jnp.mean(jnp.argmax(outputs, axis=-1) == y)


def one_after_the_other(
    params: Any,
    remember: Callable[[Any], Any],
    loss: Callable[[Any, Any, Any, Any, Any], Any],
    scores: Callable[[Any], Any],
    data: Any,
    steps: int,
    key: Any,
) -> tuple[Any, Any]:
    """`(scores after each task, parameters after each)`: Adam starts afresh with every task.

    `loss(params, task, batch, what `remember` gave at its start, key)`.
    """
    optimizer = optax.adam(RATE)

    def task(params: Any, at: Any) -> tuple[Any, Any]:
        t, key = at
        x, y = (leaf[t] for leaf in data)
        kept = remember(params)

        def step(carry: Any, key: Any) -> tuple[Any, None]:
            params, state = carry
            pick, key = jax.random.split(key)
            rows = jax.random.randint(pick, (BATCH,), 0, len(y))
            updates, state = optimizer.update(jax.grad(loss)(params, t, (x[rows], y[rows]), kept, key), state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))
        return params, (scores(params), params)

    return jax.lax.scan(task, params, (jnp.arange(TASKS), jax.random.split(key, TASKS)))[1]


# The hypernetwork: its weights, and an embedding for each task.

RESPONSE = hg.responses.mlp(hidden=LAYERS)


def new_hypernetwork(key: Any, outputs: int) -> dict[str, Any]:
    keys = jax.random.split(key, 3)
    embeddings = jax.random.normal(keys[0], (TASKS, EMBEDDING))
    weights = RESPONSE.init(keys[1], new_network(keys[2], outputs), embeddings[0])
    return {"weights": weights, "embeddings": embeddings}


def made(params: Any) -> Any:
    """The networks of all tasks, stacked."""
    return jax.vmap(lambda e: RESPONSE.apply(params["weights"], e))(params["embeddings"])


def with_embeddings(start: Any, key: Any, beta: Any, learn: Any, data: Any, tested: Any, steps: int) -> tuple[Any, Any]:
    """Scores `[part, after, task]` and parameters after each task; embeddings of earlier tasks stay what they are."""

    def loss(params: Any, t: Any, batch: Any, kept: Any, key: Any) -> Any:
        ours = (jnp.arange(TASKS) == t) * learn
        e = params["embeddings"]
        fixed = params | {"embeddings": jnp.where(ours[:, None] > 0, e, jax.lax.stop_gradient(e))}
        networks = made(fixed)
        moved = jax.tree.map(lambda a, b: jnp.sum((a - b).reshape(TASKS, -1) ** 2, axis=1), networks, kept)
        moved = sum(jax.tree.leaves(moved))
        penalty = jnp.sum(jnp.where(jnp.arange(TASKS) < t, moved, 0.0)) / jnp.maximum(t, 1)
        mine = jax.tree.map(lambda leaf: leaf[t], networks)
        return cross_entropy(network(mine, batch[0]), batch[1]) + beta * penalty

    def scores(params: Any) -> Any:
        return [jax.vmap(lambda w, x, y: accuracy(network(w, x), y))(made(params), *part) for part in tested]

    return one_after_the_other(start, made, loss, scores, data, steps, key)


def with_replay(start: Any, key: Any, setting: Any, data: Any, tested: Any, steps: int) -> Any:
    """Scores of one network with a head for each task, or one head for all where `heads` is 0; of every earlier task
    `rows` rows are kept, 0 for fine-tuning, whose loss counts `weight` times.
    """
    rows, heads, weight = setting

    def loss(w: Any, t: Any, batch: Any, kept: Any, key: Any) -> Any:
        pick = jax.random.randint(key, (TASKS, BATCH), 0, jnp.maximum(rows, 1))
        again = jax.vmap(lambda s, x, y, p: cross_entropy(of_task(w, heads * s, x[p]), y[p]))(
            jnp.arange(TASKS), *data, pick
        )
        earlier = jnp.where((jnp.arange(TASKS) < t) & (rows > 0), again, 0.0)
        return cross_entropy(of_task(w, heads * t, batch[0]), batch[1]) + weight * jnp.sum(earlier)

    def scores(w: Any) -> Any:
        of_all = jax.vmap(lambda t, x, y: accuracy(of_task(w, heads * t, x), y))
        return [of_all(jnp.arange(TASKS), *part) for part in tested]

    return one_after_the_other(start, lambda w: None, loss, scores, data, steps, key)[0]


def apart(key: Any, outputs: int, data: Any, tested: Any, steps: int) -> Any:
    """Test accuracy of one network for each task."""

    def one(key: Any, x: Any, y: Any, tested: Any) -> Any:
        optimizer, start = optax.adam(RATE), new_network(key, outputs)

        def step(carry: Any, key: Any) -> tuple[Any, None]:
            w, state = carry
            rows = jax.random.randint(key, (BATCH,), 0, len(y))
            grads = jax.grad(lambda w: cross_entropy(network(w, x[rows]), y[rows]))(w)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(w, updates), state), None

        (w, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, steps))
        return accuracy(network(w, tested[0]), tested[1])

    return jax.vmap(one)(jax.random.split(key, TASKS), *data, tested)


def size_of(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def summary(after: Any) -> dict[str, Any]:
    """Of test scores `[after, task]`."""
    after = np.asarray(after)
    return {
        "first": after[-1, 0],
        "mean": np.mean(after[-1]),
        "learned": np.mean(np.diag(after)),
        "last": after[-1, -1],
    }


def compare(name: str, seed: int, smoke: bool) -> tuple[dict[str, Any], Any]:
    """`(numbers, what is drawn)` of one sequence of tasks."""
    steps, outputs, numbers = 5 if smoke else STEPS, CLASSES[name], {}
    train, valid, test = (split_digits if name == "split" else permuted_digits)(seed, (1000, 300))
    key, tested, n = jax.random.key(seed), (valid, test), train[1].shape[1]

    # What each keeps, in numbers: the hypernetwork with its embeddings, and the networks that the penalty holds.
    start, shared = new_hypernetwork(key, outputs), new_network(key, TASKS * outputs)
    one = size_of(new_network(key, outputs))
    memory = {"hypernetwork": size_of(start), "held": (TASKS - 1) * one, "separate": TASKS * one}
    room = memory["hypernetwork"] + memory["held"] - size_of(shared)
    numbers["memory"] = memory | {"over_separate": (memory["hypernetwork"] + memory["held"]) / memory["separate"]}
    rows = {
        "one_head": 0,
        "fine_tuning": 0,
        "replay": min(room // 65 // (TASKS - 1), n),  # 64 pixels and a label, a number each
        "replay_bytes": min(4 * room // 65 // (TASKS - 1), n),  # a byte each, where a weight takes four
    }
    numbers["rows"] = {**rows, "all": n}

    betas = jnp.asarray([*BETAS, *BETAS[1:]])
    learn = jnp.asarray([1.0] * len(BETAS) + [0.0] * len(BETAS[1:]))
    run = lambda beta, learn: with_embeddings(start, key, beta, learn, train, tested, steps)
    (of_valid, of_test), params = jax.jit(jax.vmap(run))(betas, learn)
    ends = np.asarray(of_valid)[:, -1].mean(axis=1)
    best, frozen = int(np.argmax(ends[: len(BETAS)])), len(BETAS) + int(np.argmax(ends[len(BETAS) :]))
    numbers["beta"] = betas[best]
    for arm, i in {"embeddings": best, "no_penalty": 0, "frozen": frozen}.items():
        numbers[arm] = summary(of_test[i])
    numbers["by_beta"] = {f"{b:g}": np.mean(of_test[i, -1]) for i, b in enumerate(BETAS)}

    lanes = [("one_head", 0, 0.0), ("fine_tuning", 1, 0.0)]
    lanes += [(arm, 1, weight) for arm in ("replay", "replay_bytes") for weight in WEIGHTS]
    settings = [jnp.asarray(each) for each in zip(*((rows[arm], *rest) for arm, *rest in lanes), strict=True)]
    replay = lambda *setting: with_replay(shared, key, setting, train, tested, steps)
    of_valid, found = map(np.asarray, jax.jit(jax.vmap(replay))(*settings))
    chosen = {}  # by the mean over tasks on validation rows, as the strength of the penalty is
    for arm in rows:
        mine = [i for i, lane in enumerate(lanes) if lane[0] == arm]
        chosen[arm] = max(mine, key=lambda i: of_valid[i, -1].mean())
        numbers[arm] = {**summary(found[chosen[arm]]), "weight": lanes[chosen[arm]][2]}
    alone = np.asarray(jax.jit(lambda: apart(key, outputs, train, test, steps))())
    numbers["separate"] = {"first": alone[0], "mean": np.mean(alone)}
    numbers["lost"] = numbers["separate"]["first"] - numbers["embeddings"]["first"]
    numbers["saved"] = numbers["embeddings"]["first"] - numbers["fine_tuning"]["first"]
    numbers["behind_replay"] = numbers["replay"]["mean"] - numbers["embeddings"]["mean"]

    # The embedding carries the task: every task's rows, with the networks of all embeddings.
    networks = jax.jit(made)(jax.tree.map(lambda leaf: leaf[best, -1], params))
    all_networks = jax.vmap(lambda w, x, y: accuracy(network(w, x), y), in_axes=(0, None, None))
    crossed = np.asarray(jax.jit(jax.vmap(all_networks, in_axes=(None, 0, 0)))(networks, *test))
    numbers["wrong_embedding"] = np.mean(crossed[0, 1:])
    return numbers, (crossed, np.asarray(of_test[best]), {arm: found[i] for arm, i in chosen.items()})


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    drawn = {}
    for name in ("split",) if options.smoke else CLASSES:
        numbers[name], drawn[name] = compare(name, options.seed, options.smoke)
    if not options.smoke:
        draw(options.out, drawn, numbers)


def draw(folder: Path, drawn: dict[str, Any], numbers: dict[str, Any]) -> None:
    from experiments import _figures as style

    figure = style.figure(14, 4.6)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.1, 1.1))
    crossed, kept, others = drawn["permuted"]
    after = np.arange(1, TASKS + 1)
    lines = {
        "embeddings, with the penalty": (kept, style.BLUE),
        "replay, as many numbers": (others["replay"], style.GREEN),
        "fine-tuning, a head for each task": (others["fine_tuning"], style.ORANGE),
        "fine-tuning, one head": (others["one_head"], style.PINK),
    }
    for label, (scores, color) in lines.items():
        left.plot(after, scores[:, 0], "o-", color=color, linewidth=2, label=label)
    left.legend(frameon=False, fontsize=9, loc="lower left")
    left.set(xticks=after, ylim=(0, 1.02))
    style.titled(left, "Permuted pixels: the first task", xlabel="tasks learned", ylabel="test accuracy on the first")
    middle.imshow(crossed, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(TASKS, TASKS):
        value = crossed[row, column]
        middle.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 else style.INK)
    style.titled(middle, "Permuted pixels: at the end", xlabel="embedding of task", ylabel="test rows of task")
    middle.grid(False)
    middle.set(xticks=range(TASKS), xticklabels=after, yticks=range(TASKS), yticklabels=after)
    names = {
        "separate": ("a network for each task", style.INK),
        "replay": ("replay, as many numbers", style.GREEN),
        "embeddings": ("embeddings, with the penalty", style.BLUE),
        "no_penalty": ("without it", style.SKY),
        "fine_tuning": ("fine-tuning, a head for each", style.ORANGE),
        "one_head": ("fine-tuning, one head", style.PINK),
    }
    bars = {label: (numbers["permuted"][arm]["mean"], color) for arm, (label, color) in names.items()}
    style.bars(right, bars, "Permuted pixels: all five, at the end", xlabel="mean test accuracy", xlim=(0, 1.2))
    style.save(figure, folder, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Permuted digits: the first task",
            "test accuracy at the end",
            {
                "embeddings, with the penalty": ("permuted.embeddings.first", style.BLUE),
                "… not learned": ("permuted.frozen.first", style.SKY),
                "… without the penalty": ("permuted.no_penalty.first", style.INK),
                "fine-tuning, one head": ("permuted.one_head.first", style.PINK),
                "fine-tuning, a head each": ("permuted.fine_tuning.first", style.ORANGE),
                "replay, as many numbers": ("permuted.replay.first", style.GREEN),
                "replay, as many bytes": ("permuted.replay_bytes.first", style.GREEN),
                "a network each": ("permuted.separate.first", style.YELLOW),
            },
        ),
        (
            "All five tasks",
            "mean test accuracy at the end",
            {
                "embeddings, with the penalty": ("permuted.embeddings.mean", style.BLUE),
                "… not learned": ("permuted.frozen.mean", style.SKY),
                "… without the penalty": ("permuted.no_penalty.mean", style.INK),
                "fine-tuning, one head": ("permuted.one_head.mean", style.PINK),
                "fine-tuning, a head each": ("permuted.fine_tuning.mean", style.ORANGE),
                "replay, as many numbers": ("permuted.replay.mean", style.GREEN),
                "replay, as many bytes": ("permuted.replay_bytes.mean", style.GREEN),
                "a network each": ("permuted.separate.mean", style.YELLOW),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)
