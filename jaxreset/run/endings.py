"""How a run ends before its end: what is saved of it, and what it says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from jaxreset.config import Config
from jaxreset.errors import PreemptedError, RunError
from jaxreset.learning.learner import TrainProgress
from jaxreset.learning.update import TrainState
from jaxreset.run.checkpoints import Checkpoints, saved_steps


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA says so, of a program that it compiles or runs."""
    said = str(error).lower()
    ours = isinstance(error, jax.errors.JaxRuntimeError)
    return ours and any(words in said for words in ("resource_exhausted", "out of memory"))


@contextmanager
def explained(config: Config, checkpoints: Path) -> Iterator[None]:
    """Inside, what ends a run says which step is saved in the folder `checkpoints`, and how to go on.

    Raises:
      PreemptedError: asked to end.
      RunError: XLA was out of memory; with keys that take less.
    """
    try:
        yield
    except PreemptedError as error:
        raise PreemptedError(error.by, max(saved_steps(checkpoints), default=None)) from None
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        saved = max(saved_steps(checkpoints), default=None)
        start = (
            "it starts anew"
            if saved is None
            else f"step {saved} is saved, and it goes on from there"
        )
        raise RunError(
            f"the devices' memory doesn't suffice ({_first_line(error)}). Start the same command again "
            f"with {_smaller(config)}: {start}. These keys change no result but for rounding"
        ) from error


def save_finished(checkpoints: Checkpoints, state: TrainState, progress: TrainProgress) -> None:
    """Saves the last finished step, unless the update that broke off has overwritten it."""
    if jax.process_count() > 1:
        return  # the others may be elsewhere, and saving is done by all
    if progress.normalizer == 0:  # the sum that an update overwrites first was of nothing
        state = state._replace(gradients=None)
    if not any(x.is_deleted() for x in jax.tree.leaves(state)):
        checkpoints.save(state, progress)


def _smaller(config: Config) -> str:
    """The keys that take less memory, with values."""
    keys = [] if config.train.remat else ["train.remat=true"]
    if (half := config.train.microbatch_tokens // 2) > 0:
        keys.append(f"train.microbatch_tokens={half}")
    if config.sampling.hold_cache != "never":
        keys.append("sampling.hold_cache=never")
    keys.append("a smaller sampling.slots" if config.sampling.slots else "sampling.slots=16")
    return f"{', '.join(keys[:-1])} or {keys[-1]}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
