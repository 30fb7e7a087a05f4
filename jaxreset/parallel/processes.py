"""Several processes as one program: how they start, agree, share what each has, and end together.

Every process runs the same host code on the same values, so that each decides the same. What only one
of them knows (rewards of its rows, a signal that it got) is shared here before anything depends on it.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxreset.errors import ConfigError, PreemptedError, RunError

Item = TypeVar("Item")

HEARTBEAT_SECONDS = 30  # without a sign of life after which a process counts as lost
FAILURE = "jaxreset/failure"  # key of the coordination service: why a process has failed
LEAST_GATHERED = 4096  # bytes; each size takes a program of its own
WATCH_SECONDS = 1.0  # between looks at whether another process has failed
# For the others to read why: the service may end with the process that failed.
FAREWELL_SECONDS = 3.0


def start(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Joins the other processes of a job; call it before anything touches a device.

    Without arguments the job is found as JAX finds it: TPU pods, SLURM, Open MPI, Kubernetes, or the
    environment variable JAX_COORDINATOR_ADDRESS. Where there is none, this process is all there is.

    Args:
      coordinator: `host:port` of process 0.
      count: how many processes there are.
      index: which of them this is.

    Raises:
      ConfigError: some of the three without the others, or out of range; or the others can't be reached.
    """
    given = {"--coordinator": coordinator, "--processes": count, "--process": index}
    missing = [flag for flag, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ConfigError(
            f"{', '.join(missing)} missing: several processes take all of {', '.join(given)}"
        )
    if count is not None and index is not None and not 0 <= index < count:
        raise ConfigError(
            f"--process {index}: expected 0 to {count - 1}, one less than --processes {count}"
        )
    if coordinator is None and not _in_a_job():
        return
    # Two CPU programs with exchanges that are queued at once may wait for each other's.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the job's processes didn't find one another: {error}") from error


def _in_a_job() -> bool:
    """Whether JAX would find other processes."""
    from jax._src.clusters import ClusterEnv  # there is no public way to ask

    named = "JAX_COORDINATOR_ADDRESS" in os.environ
    return named or any(
        env.is_env_present() and not env.opt_in_only_method for env in ClusterEnv._cluster_types
    )


def is_leader() -> bool:
    """Whether this process is the one that writes and shows."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is true in any process; each must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def wait_for_all(name: str) -> None:
    """Returns when every process has called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(items: Sequence[Item]) -> list[Item]:
    """The items of all processes, in the processes' order; any picklable ones, of any number."""
    if jax.process_count() == 1:
        return list(items)
    mine = np.frombuffer(pickle.dumps(list(items)), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(mine), np.int32))
    longest = max(int(sizes.max()), LEAST_GATHERED)
    padded = np.zeros(1 << (longest - 1).bit_length(), np.uint8)
    padded[: len(mine)] = mine
    every = multihost_utils.process_allgather(padded)
    return [
        x for data, n in zip(every, sizes, strict=True) for x in pickle.loads(data[:n].tobytes())
    ]


def own_share(count: int) -> range:
    """Which of `count` items this process takes care of: runs of almost equal length."""
    processes, index = jax.process_count(), jax.process_index()
    return range(index * count // processes, (index + 1) * count // processes)


def put(tree: Any, sharding: Any) -> Any:
    """Arrays of the host, the same in every process, laid out over the devices of all of them.

    Args:
      tree: of arrays.
      sharding: one for all, a tree of them, or None: the default device.
    """
    if jax.process_count() == 1 or sharding is None:
        return jax.device_put(tree, sharding)

    def place(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    if isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda x: place(x, sharding), tree)
    return jax.tree.map(place, tree, sharding)


def fetch(tree: Any) -> Any:
    """Arrays on devices, of all processes too -> numpy arrays, whole in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)


@contextmanager
def ending_together() -> Iterator[None]:
    """What ends one process with an error ends the others too, with its message.

    A process that is killed can't say anything: the others notice by its broken connections, or after
    `HEARTBEAT_SECONDS`.
    """
    client = _client()
    if client is None:
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(client, ended), daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            raise
        if isinstance(error, PreemptedError):  # raised in every process: an orderly end
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            error = RunError(
                f"work with the other processes broke off, one may have ended: {error}"
            )
        reason = f"process {jax.process_index()}: {type(error).__name__}: {error}"
        _say(reason)
        client.key_value_set(FAILURE, reason, allow_overwrite=True)
        time.sleep(FAREWELL_SECONDS)
        os._exit(2 if isinstance(error, ConfigError) else 1)  # an orderly end waits for the others
    finally:
        # A thread that comes back from a call into JAX while Python ends aborts the process.
        ended.set()
        watch.join(FAREWELL_SECONDS)


def _watch(client: Any, ended: threading.Event) -> None:
    """Ends this process when another one has said that it failed."""
    while not ended.wait(WATCH_SECONDS):
        try:
            reason = client.key_value_try_get(FAILURE)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the service has ended: the run has, or JAX says why
        if not reason.startswith(f"process {jax.process_index()}:"):
            _say(reason)
            if (
                is_leader()
            ):  # the service ends with this process: the others have time to end before
                time.sleep(FAREWELL_SECONDS)
            os._exit(1)


def _say(reason: str) -> None:
    print(f"error: ended by {reason}", file=sys.stderr, flush=True)


def _client() -> Any:
    # The service's key-value store has no public name.
    from jax._src.distributed import global_state

    return global_state.client
