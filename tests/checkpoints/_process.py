"""One of two processes of four devices each, which run `hg.tune` with checkpoints that Orbax writes.

    python _process.py ADDRESS INDEX FOLDER DIE_AT

Ends without a word in step DIE_AT, as a machine that is taken away does. With -1 it goes on to the end, prints what it
was told when it made another call with the same folder, and then two fingerprints of all numbers that it holds of a
result: of the run with checkpoints, and of one that had none.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hypergrad as hg

WIDTH, STEPS, EVERY = 16, 6, 2


def main(address: str, index: int, folder: str, die_at: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(address, 2, index)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)

    def spread(*shape: int) -> jax.Array:
        x = rng.normal(size=shape).astype(np.float32)
        return jax.make_array_from_callback(shape, NamedSharding(mesh, PartitionSpec("data")), lambda part: x[part])

    fit = lambda w, h, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    problem = hg.Problem(lambda w, h, batch: fit(w, h, batch) + jnp.sum(jnp.exp(h) * w**2), fit)
    solver = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.05), steps=2), mode="reverse")
    data = [(spread(64, WIDTH), spread(64)) for _ in range(2)]
    start, given = (spread(WIDTH), spread(WIDTH)), {"steps": STEPS, "progress": False, "key": jax.random.key(0)}
    asked = []

    def die(step: int, metrics: Any) -> None:
        asked.append(step)
        if step == die_at:
            os._exit(0)

    kept = {"checkpoint": hg.outer.orbax(folder), "every": EVERY, **given}
    found = hg.tune(solver, *start, *data, outer=optax.adam(0.1), callbacks=die, **kept)
    assert asked == list(range(4, STEPS)), "it went on where the other had stopped"
    try:
        hg.tune(solver, *start, *data, outer=optax.sgd(0.1), **kept)
    except hg.InputError as error:
        sys.stdout.write(f"{error}\n")
    plain = hg.tune(solver, *start, *data, outer=optax.adam(0.1), **given)
    sys.stdout.write(f"{fingerprint(found)} {fingerprint(plain)}\n")


def fingerprint(result: hg.Result) -> str:
    history = tuple(result.history._replace(seconds=np.zeros(STEPS)))
    sha256 = hashlib.sha256()
    for leaf in jax.tree.leaves((result.hparams, result.params, result.best, history, result.state)):
        parts = [shard.data for shard in leaf.addressable_shards] if isinstance(leaf, jax.Array) else [leaf]
        for part in parts:
            sha256.update(np.asarray(part).tobytes())
    return sha256.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
