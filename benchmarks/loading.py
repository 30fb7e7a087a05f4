"""Loading a checkpoint onto a mesh: how much host memory it takes, straight and by way of one device.

    python benchmarks/loading.py [--table FILE] [--folder FOLDER]

Writes a checkpoint of Qwen2.5-1.5B's sizes with random numbers in a temporary folder (inside FOLDER),
and loads it in fresh processes onto 8 simulated CPU devices. These keep their arrays in the host's
memory, and nothing but norms and biases lies on more than one of them: so a process needs at least the
checkpoint's size, and what it takes beyond that is what loading costs. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from common import measured_on, write_checkpoint

from jaxreset.models.block import DecoderConfig
from jaxreset.models.placement import param_shardings
from jaxreset.models.policy import load_policy
from jaxreset.parallel import make_mesh

CONFIG = DecoderConfig(
    vocab=151_936,
    layers=28,
    width=1536,
    heads=12,
    kv_heads=2,
    head_dim=128,
    mlp=8960,
    rope_theta=1e6,
    qkv_bias=True,
    dtype="bfloat16",
)
SHARDS, MESH = 5, (1, 4, 2)
CASES = [("straight", "bfloat16"), ("whole", "bfloat16"), ("straight", "float32")]


def load(folder: str, way: str, dtype: str) -> dict[str, float]:
    """Loads it in this process; the most memory it took before and in all, and the seconds."""
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = make_mesh(*MESH)
    before, start = peak_bytes(), time.perf_counter()
    if way == "straight":
        params = load_policy(folder, dtype=dtype, mesh=mesh).params
    else:
        params = load_policy(folder, dtype=dtype).params
        params = jax.device_put(params, param_shardings(mesh, params))
    jax.block_until_ready(params)
    return {"before": before, "peak": peak_bytes(), "seconds": time.perf_counter() - start}


def peak_bytes() -> int:
    """The most resident memory of this process so far: also its code and the files it has mapped.

    Not `ru_maxrss`, in which a child starts with its parent's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def in_fresh_process(*arguments: str) -> dict[str, float]:
    """`load`, in a process of its own."""
    command = [sys.executable, __file__, "--load", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


HEADER = f"""# Loading, measured

Written by `python benchmarks/loading.py --table FILE`: {{numbers:.2f}} billion random numbers in the
shapes of Qwen2.5-1.5B, stored in bfloat16 in {SHARDS} shards, loaded by a fresh process onto 8 simulated
CPU devices, fsdp {MESH[1]} × tensor {MESH[2]}. The devices keep their arrays in the host's memory, so a
ratio of 1.00 is the least that is possible.

- `straight`: `load_policy(folder, mesh=mesh)`; `whole`: onto one device, and from there over the mesh,
  which takes more or less with how soon arrays are let go (1.5 to 1.9 in three runs).
- `before`: the most resident memory of the process before it loads: Python, the libraries, the devices.
- `peak`: the most in all, `before` and the pages of mapped files among it; `ratio`: that over the
  checkpoint's size in the dtype that is loaded.

"""


def table(rows: list[tuple[str, str, dict[str, float]]], numbers: int) -> str:
    """The measurements in Markdown, with what they were made on."""
    lines = [
        "| way | dtype | checkpoint, GB | before, GB | peak, GB | ratio | seconds |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for way, dtype, found in rows:
        size = numbers * jnp.dtype(dtype).itemsize
        cells = [f"{n / 1e9:.2f}" for n in (size, found["before"], found["peak"])]
        cells += [f"{found['peak'] / size:.2f}", f"{found['seconds']:.0f}"]
        lines.append(f"| `{way}` | {dtype} | {' | '.join(cells)} |")
    packages = ("jax", "flax", "safetensors", "transformers")
    lines += [
        "",
        f"One turn each, just after the files were written; {measured_on(packages)}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="write the table there, as Markdown")
    parser.add_argument("--folder", type=Path, help="where there is room for 3 GB")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(*args.load)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        numbers = write_checkpoint(Path(folder), CONFIG, shards=SHARDS)
        rows = [(*case, in_fresh_process(folder, *case)) for case in CASES]
    text = HEADER.format(numbers=numbers / 1e9) + table(rows, numbers)
    print(text)
    if args.table:
        args.table.write_text(text)


if __name__ == "__main__":
    main()
