"""Training and validation data as the solvers see them: a full batch, minibatches drawn inside jit, or a host stream.

In each of these forms, `draw(data, key, step)` is the batch of one inner step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._options import Number, options
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree, is_key, keystr


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Minibatches:
    """Arrays from which each step draws `size` random rows; made by `hg.minibatches`."""

    arrays: PyTree
    size: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """Host batches stacked on a new leading axis; inner step t sees batch t modulo their number. Made by `tune`."""

    batches: PyTree


@dataclasses.dataclass(eq=False)
class Stream:
    """A host iterator of batches; made by `hg.stream`, consumed by `hg.tune`.

    Attributes:
        iterator: source of the batches.
        per_step: number of batches in one outer step.
        position: number of batches handed out since the stream was made, which is the data cursor of a checkpoint.
        recent: batches handed out since the last `forget`; `seek` can put them back.
    """

    iterator: Iterator[PyTree]
    per_step: int
    position: int = 0
    recent: list[PyTree] = dataclasses.field(default_factory=list, repr=False)
    _ahead: list[PyTree] = dataclasses.field(default_factory=list, repr=False)

    def next(self) -> Stacked:
        """Take the batches of one outer step and stack them."""
        batches = []
        for _ in range(self.per_step):
            try:
                batches.append(prepare("hg.stream: the batch", self._pull()))
            except StopIteration:
                raise InputError(
                    f"hg.stream: the iterator ended after {len(batches)} of the {self.per_step} batches that one outer "
                    "step needs; give a loader or a list, which is restarted, or a generator with `while True`."
                ) from None
        kinds = [kind(b) for b in batches]
        for found in kinds:
            if found != kinds[0]:
                raise InputError(
                    f"hg.stream: batches must all have the same shape, found {kinds[0]} and {found}: "
                    "drop or pad the last, smaller batch of an epoch."
                )
        return Stacked(jax.tree.map(stack, *batches))

    def seek(self, position: int) -> None:
        """Move to where `position` batches have been handed out: put recent ones back, or pull and drop.

        Raises:
            InputError: if that is further back than `recent` reaches, or beyond the end of the iterator.
        """
        back = self.position - position
        if back > len(self.recent):
            raise InputError(
                f"hg.stream: {self.position} batches were handed out already, and the run stands at {position}: "
                "make the stream anew, hg.stream(...), so that it starts from its first batch."
            )
        if back > 0:
            self._ahead[:0] = self.recent[-back:]
            del self.recent[-back:]
            self.position = position
        while self.position < position:
            try:
                self._pull()
            except StopIteration:
                raise InputError(
                    f"hg.stream: the iterator ended after {self.position} batches, and the run stands at {position}: "
                    "the loader is not the one that the run began with."
                ) from None
            del self.recent[:-1]

    def forget(self) -> None:
        """Forget the items handed out so far: they have been used and will not be put back."""
        self.recent.clear()

    def _pull(self) -> PyTree:
        batch = self._ahead.pop(0) if self._ahead else next(self.iterator)
        self.recent.append(batch)
        self.position += 1
        return batch


@options(size=Number(integer=True, static=True, advice="write the rows of one batch"))
def minibatches(arrays: PyTree, size: int) -> Minibatches:
    """Give every step `size` rows, drawn uniformly with replacement inside jit from the key of the step.

    Args:
        arrays: pytree of arrays whose leading axes have the same length, `[n, ...]`.
        size: rows per batch.

    Raises:
        InputError: for empty data, leading axes of different lengths, or a size outside [1, n].
        InputTypeError: for a size that is not an integer, or leaves that are not arrays.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> hg.minibatches((jnp.zeros((10, 3)), jnp.zeros(10)), 4).size
    4
    """
    arrays = prepare("minibatches: arrays", arrays)
    n = rows(arrays, "minibatches")
    if not 1 <= size <= n:
        raise InputError(
            f"minibatches: size must be between 1 and the {n} rows of the data, found {size}: "
            "pass the arrays themselves to use all rows at every step."
        )
    return Minibatches(jax.tree.map(jnp.asarray, arrays), int(size))


@options(per_step=Number(least=1, integer=True, static=True, advice="write how many batches one outer step uses"))
def stream(iterator: Iterable[PyTree], per_step: int) -> Stream:
    """Use a host data loader: any iterable of batches (pytrees of equal shapes), restarted when it ends, if possible.

    `hg.tune(..., checkpoint=...)` counts the batches that it takes. A resumed run pulls and drops that many from the
    new stream, so the loader must yield the same batches in the same order each time the program runs (a fixed shuffle
    seed); the last of them is compared with the one that the interrupted run saw.

    Args:
        iterator: source of the batches; `hg.tune` pulls from it between compiled steps.
        per_step: number of batches for one outer step, usually the number of inner steps; fewer are cycled through.

    Raises:
        InputError: if `per_step` is not positive.
        InputTypeError: if it is not an integer, or if there is nothing to iterate over.

    >>> import hypergrad as hg, numpy as np
    >>> hg.stream([np.zeros(4), np.ones(4)], per_step=3).next().batches.shape
    (3, 4)
    """
    if not isinstance(iterator, Iterable) and not hasattr(iterator, "__getitem__"):
        raise InputTypeError(
            f"stream: iterator must be an iterable of batches, found {type(iterator).__name__}: "
            "write a list of batches, a data loader or a generator."
        )
    return Stream(_Endless(iterator), int(per_step))


class _Endless(Iterator[PyTree]):
    """An iterator that restarts when it ends. It is not a generator, which an interrupt would end for good."""

    def __init__(self, batches: Iterable[PyTree]):
        self.batches, self.iterator = batches, None

    def __next__(self) -> PyTree:
        if self.iterator is not None:
            with contextlib.suppress(StopIteration):
                return next(self.iterator)
        self.iterator = iter(self.batches)
        return next(self.iterator)  # an exhausted generator or an empty iterable ends here


def prepare(name: str, data: PyTree) -> PyTree:
    """Refuse data that cannot be a batch: no arrays, no examples, or features and labels that do not pair up.

    Returns the data with Python numbers and foreign arrays (a tensor on the host) as NumPy arrays, not yet on a device.
    """
    if data is None or isinstance(data, (Minibatches, Stacked, Stream)):
        return data
    arrays = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _as_array(f"{name}{keystr(path)}", leaf), data, is_leaf=lambda x: hasattr(x, "__next__")
    )
    if type(data) in (tuple, list) and len(data) == 2 and all(hasattr(x, "shape") and x.shape for x in arrays):
        first, second = arrays[0].shape[0], arrays[1].shape[0]
        if first != second:
            raise InputError(
                f"{name}[0] has {first} rows and {name}[1] has {second}: a pair holds the features and "
                "the labels of the same examples; write arrays that do not pair up as a dict."
            )
    return arrays


def _as_array(where: str, leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        found = leaf
    elif isinstance(leaf, (bool, int, float, complex, np.generic, np.ndarray)) or hasattr(leaf, "__array__"):
        found = np.asarray(leaf)
    elif hasattr(leaf, "__iter__") and not isinstance(leaf, (str, bytes)):
        raise InputTypeError(
            f"{where} is a {type(leaf).__name__}, which yields batches: wrap it, as in hg.stream(loader, per_step=10)."
        )
    else:
        raise InputTypeError(
            f"{where} is a {type(leaf).__name__}; the leaves of a batch must be arrays: "
            "let the losses close over other settings."
        )
    if not is_key(found) and found.dtype.kind in "OUSMm":
        raise InputTypeError(f"{where} has dtype {found.dtype}, which JAX cannot compute with: encode it as numbers.")
    if 0 in found.shape:
        raise InputError(
            f"{where} is empty (shape {tuple(found.shape)}); the loss of no data is NaN or 0: "
            "pass at least one example, or None for a loss that closes over its data."
        )
    return found


def kind(data: PyTree) -> Any:
    """The shapes and dtypes of a batch, comparable and printable."""
    return jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", data)


def rows(arrays: PyTree, name: str) -> int:
    """The common length of the leading axes.

    Raises:
        InputError: if there is none, naming the paths and shapes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    if not leaves:
        raise InputError(f"{name}: the data hold no arrays: pass a pytree of arrays such as (X, y).")
    lengths = {}
    for path, leaf in leaves:
        if not jnp.shape(leaf):
            raise InputError(
                f"{name}: {keystr(path) or 'the data'} is a scalar; every array needs a leading axis of "
                "rows: let the losses close over constants."
            )
        lengths[keystr(path) or "the array"] = jnp.shape(leaf)[0]
    if len(set(lengths.values())) > 1:
        raise InputError(
            f"{name}: the leading axes have different lengths: "
            + ", ".join(f"{k} has {v}" for k, v in lengths.items())
            + "; each row is one example, in every array."
        )
    return next(iter(lengths.values()))


def stack(*batches: Any) -> Any:
    """Stack batches, on the host if they are there, so that one transfer carries them all."""
    on_host = all(isinstance(b, np.ndarray) for b in batches)
    return np.stack(batches) if on_host else jnp.stack([jnp.asarray(b) for b in batches])


def draw(data: PyTree, key: Array | None, step: Any) -> PyTree:
    """The batch of one inner step."""
    if isinstance(data, Stream):
        raise InputTypeError("hg.stream is read by hg.tune on the host; inside jit pass arrays or hg.minibatches.")
    if isinstance(data, Stacked):
        count = jax.tree.leaves(data.batches)[0].shape[0]
        return jax.tree.map(lambda x: x[jnp.asarray(step) % count], data.batches)
    if isinstance(data, Minibatches):
        if key is None:
            raise InputError("hg.minibatches draws rows at random: pass key=jax.random.key(0) to hypergrad or tune.")
        n = jax.tree.leaves(data.arrays)[0].shape[0]
        index = jax.random.randint(key, (data.size,), 0, n, jnp.int32)  # the same rows in either precision
        return jax.tree.map(lambda x: x[index], data.arrays)
    return data


def is_random(data: PyTree) -> bool:
    """Whether two steps see different batches."""
    return isinstance(data, (Minibatches, Stacked))


def warn_small_batch(data: PyTree, n_params: int) -> None:
    """Warn when a Hessian is estimated from fewer rows than parameters although more rows are available."""
    if isinstance(data, Minibatches) and data.size < n_params and data.size < jax.tree.leaves(data.arrays)[0].shape[0]:
        warnings.warn(
            f"the inverse Hessian is taken from a minibatch of {data.size} rows for {n_params} parameters: the "
            "hypergradient is biased (by ×1.8 at 16 of 512 rows in our measurements). Pass the full arrays to "
            "hg.implicit, or use damping.",
            UserWarning,
            stacklevel=3,
        )
