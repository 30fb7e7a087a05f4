"""Moving keys and values between stores over a mesh: read from the programs, nothing crosses devices."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from jaxreset.models.decoder import KV
from jaxreset.parallel import cache_sharding, make_mesh, rows_sharding
from jaxreset.parallel.topology import slice_of
from jaxreset.sampling.stores import fork, lay, lift

COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\S*\("
)
GROUPS, ROWS, PREFIX, WINDOW = 8, 4, 32, 16


@pytest.fixture(scope="module", params=["cpu:8", "v5e:2x2"])
def arrays(request):
    """Makes abstract stores and index arrays that lie on a mesh."""
    if request.param == "v5e:2x2":
        pytest.importorskip("libtpu", reason="the compiler of TPU programs, part of jax[tpu]")
    devices = slice_of(request.param).devices
    mesh = make_mesh(2, len(devices) // 4, 2, devices)

    def store(*around, slots):
        def array(*shape):
            sharding = cache_sharding(mesh, shape, head_axis=-3)
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

        heads, width = 4, 8
        return (KV(array(2, *around, heads, width, slots), array(2, *around, heads, slots, width)),)

    def numbers(count, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((count,), dtype, sharding=rows_sharding(mesh))

    return mesh, store, numbers


PROGRAMS = {
    "fork": lambda store, n: (
        fork.lower,
        (store(GROUPS, slots=PREFIX), store(GROUPS, ROWS, slots=WINDOW), n(GROUPS), n(16), (n(16), n(16))),
        {"size": PREFIX + WINDOW},
    ),
    "lift": lambda store, n: (
        lift.lower,
        (store(4, ROWS, slots=WINDOW), (n(32), n(32))),
        {"size": 2 * WINDOW},
    ),
    "lay": lambda store, n: (
        lay.lower,
        (store(4, ROWS, slots=WINDOW), store(32, 1, slots=2 * WINDOW), (n(32), n(32)), n(32, jnp.bool_)),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_move_crosses_devices(arrays, name):
    mesh, store, numbers = arrays
    lower, args, options = PROGRAMS[name](store, numbers)
    program = lower(*args, mesh=mesh, **options).compile().as_text()
    assert "gather" in program or "scatter" in program  # so something is moved
    assert not COLLECTIVE.findall(program)
