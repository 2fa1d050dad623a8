"""Few-shot episodes, and digits as classes to draw them from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import hypergrad as hg

WAYS, MOST, QUERIES = 5, 5, 10  # classes of an episode; most support images and query images of a class
HELD_OUT, ROOM = 3, 2  # digits that meta-training does not see; pixels by which an image may be out of place

Classes = list[np.ndarray]  # the images of each class, [n, pixels]


class Episodes(NamedTuple):
    """Images and labels of several tasks: x [tasks, n, pixels], y [tasks, n]."""

    support: tuple[Any, Any]
    query: tuple[Any, Any]


def digits(seed: int, room: int = ROOM) -> tuple[Classes, Classes]:
    """A digit is eight classes: turned by 0 to 270 degrees, mirrored or not. Whole digits are held out.

    Every image lies at a random place of a canvas that is larger by `room`: what all classes share, and what pixels
    compared one by one do not know.
    """
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    rng = np.random.default_rng(seed)
    order, x = rng.permutation(10), (bunch.images / 16).astype(np.float32)

    def placed(images: np.ndarray) -> np.ndarray:
        canvas = np.zeros((len(images), 8 + room, 8 + room), np.float32)
        for place, image, (row, column) in zip(
            canvas, images, rng.integers(0, room + 1, (len(images), 2)), strict=True
        ):
            place[row : row + 8, column : column + 8] = image
        return canvas.reshape(len(images), -1)

    def classes(digits: Any) -> Classes:
        kinds = itertools.product((x[bunch.target == d] for d in digits), (1, -1), range(4))
        return [placed(np.rot90(images[:, :, ::mirror], turns, (1, 2))) for images, mirror, turns in kinds]

    return classes(order[HELD_OUT:]), classes(order[:HELD_OUT])


def draw(rng: np.random.Generator, classes: Classes, shots: Sequence[int]) -> Episodes:
    """An episode for each number of support images a class.

    Classes come in random order, so that a label means nothing beyond its episode. Fewer images than `MOST` are
    repeated, which leaves their mean loss as it is, so that all episodes have one shape.
    """
    x = np.empty((len(shots), WAYS, MOST + QUERIES, classes[0].shape[1]), np.float32)
    for task, few in zip(x, shots, strict=True):
        for slot, which in zip(task, rng.choice(len(classes), WAYS, replace=False), strict=True):
            rows = rng.choice(len(classes[which]), MOST + QUERIES, replace=False)
            rows[:MOST] = np.resize(rows[:few], MOST)
            slot[:] = classes[which][rows]
    y = np.broadcast_to(np.arange(WAYS, dtype=np.int32)[None, :, None], x.shape[:3])
    part = lambda s: (x[:, :, s].reshape(len(x), -1, x.shape[-1]), y[:, :, s].reshape(len(x), -1))
    return Episodes(part(slice(MOST)), part(slice(MOST, None)))


def streams(seed: int, classes: Classes, shots: Sequence[int]) -> tuple[Any, Any]:
    """Support and query images of the same episodes: each is drawn once, and its halves are handed out."""
    rng = np.random.default_rng(seed)
    left, right = itertools.tee(draw(rng, classes, shots) for _ in itertools.count())
    return hg.stream((e.support for e in left), per_step=1), hg.stream((e.query for e in right), per_step=1)
