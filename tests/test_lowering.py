"""A script whose programs CUDA or TPU cannot run fails, and so does one in which nothing was looked at."""

from __future__ import annotations

import pytest

from tests._scripts import run_script


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("print(jax.jit(jnp.sin)(1.0))", None),
        ("print(jax.jit(jax.lax.linalg.schur)(jnp.eye(2)))", "tpu"),
        ("print(jnp.sin(1.0))", "called no jitted function"),
    ],
)
def test_what_another_platform_lacks_is_found_where_it_is_written(tmp_path, line, message):
    script = tmp_path / "script.py"
    script.write_text(f"import jax, jax.numpy as jnp\n{line}\n")
    done = run_script(script, elsewhere=True)
    assert (done.returncode == 0) is (message is None)
    assert message is None or message in done.stderr
