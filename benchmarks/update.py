"""The gradient step: ours against the unshared one, google-tunix's, and one that runs every group.

    python benchmarks/update.py [--json FILE] [--table FILE] [--repeats N] [--only PART ...]

All take the same tokens with the same model, and end with an optimizer step. They take turns, and each
ratio is between medians; memory is what the compiled gradient needs besides its arguments and results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import SIZES, Contender, Tunix, new_policy, run_parts, take_turns
from flax import nnx

from jaxreset.groups import Group
from jaxreset.learning.form import LossForm
from jaxreset.learning.microbatches import GroupBatch, PackShape, pack
from jaxreset.learning.update import accumulate, apply, init_state
from jaxreset.losses import policy_loss, token_logps
from jaxreset.models.policy import Policy

GROUPS, PREFIX, ROWS, SUFFIX = 4, 512, 8, 64
SHAPES = [PackShape(bins, ROWS, PREFIX - 1, SUFFIX) for bins in (GROUPS, 1)]
MANY, WITH_SIGNAL = 20, 6
ONE = np.float32(1)


def random_groups(count: int, *, seed: int = 0, silent: int = 0) -> list[Group]:
    """Groups of one size; the advantages of the first `silent` are 0."""
    rng = np.random.default_rng(seed)
    groups = []
    for n in range(count):
        suffixes = list(rng.integers(1, SIZES["vocab"], (ROWS, SUFFIX), np.int32))
        groups.append(
            Group(
                prompt=n,
                prefix=rng.integers(1, SIZES["vocab"], PREFIX, np.int32),
                suffixes=suffixes,
                behavior_logps=[np.full(SUFFIX, -6.0, np.float32)] * ROWS,
                rewards=np.zeros(ROWS),
                advantages=np.zeros(ROWS) if n < silent else rng.normal(size=ROWS),
            )
        )
    return groups


def rows_of(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and advantages of all rows, each a sequence of its own."""
    tokens = [np.concatenate([g.prefix, s]) for g in groups for s in g.suffixes]
    return np.stack(tokens), np.concatenate([g.advantages for g in groups]).astype(np.float32)


@partial(jax.jit, static_argnames=("graph", "remat"), donate_argnums=0)
def accumulate_unshared(
    gradients: nnx.State,
    params: nnx.State,
    tokens: np.ndarray,
    advantages: np.ndarray,
    *,
    graph: nnx.GraphDef,
    remat: bool,
) -> tuple[nnx.State, jax.Array]:
    """`update.accumulate` on sequences [B, T]: all tokens run, and the suffixes' are scored."""

    def loss(params: nnx.State) -> jax.Array:
        model = nnx.merge(graph, params)
        hidden = model.hidden(tokens[:, :-1], remat=remat)[:, -SUFFIX:]
        logps = token_logps(hidden, model.head, tokens[:, -SUFFIX:])
        mask = jnp.ones(logps.shape, bool)
        return policy_loss(logps, advantages, mask, normalizer=1.0)[0]

    value, gradient = jax.value_and_grad(loss)(params)
    return jax.tree.map(jnp.add, gradients, gradient), value


class Steps:
    """A train state, and the ways to advance it."""

    def __init__(self, policy: Policy, *, remat: bool = False):
        self.graph, self.remat = policy.graph, remat
        self.optimizer = optax.adamw(1e-6)
        params = jax.tree.map(jnp.array, policy.params)  # overwritten, so a copy
        self.state = init_state(params, self.optimizer)

    def shared(self, gradients: Any, batch: GroupBatch) -> Any:
        """Arguments of `accumulate`."""
        static = {"graph": self.graph, "form": LossForm(), "remat": self.remat}
        return accumulate, (gradients, self.state.params, nnx.State({}), batch, ONE), static

    def unshared(self, gradients: Any, rows: tuple[np.ndarray, np.ndarray]) -> Any:
        static = {"graph": self.graph, "remat": self.remat}
        return accumulate_unshared, (gradients, self.state.params, *rows), static

    def run(self, way: Callable[..., Any], batches: Sequence[Any]) -> float:
        """Seconds of one step over some microbatches."""
        start = time.perf_counter()
        gradients = self.state.gradients
        for batch in batches:
            function, arguments, static = way(gradients, batch)
            gradients, _ = function(*arguments, **static)
        state = self.state._replace(gradients=gradients)
        self.state, norm = apply(state, ONE, optimizer=self.optimizer)
        assert np.isfinite(norm)
        return time.perf_counter() - start

    def memory(self, way: Callable[..., Any], batch: Any) -> int:
        """Temporary bytes of one microbatch."""
        function, arguments, static = way(self.state.gradients, batch)
        compiled = function.lower(*arguments, **static).compile()
        return compiled.memory_analysis().temp_size_in_bytes


def prefix_part(repeats: int) -> dict[str, float]:
    """Groups of long prefixes: shared, unshared, and by google-tunix; with rematerialisation too."""
    policy, groups, tunix = new_policy(), random_groups(GROUPS), Tunix()
    (batch,), rows = pack(groups, SHAPES), rows_of(groups)
    prompts, completions = rows[0][:, :PREFIX], rows[0][:, PREFIX:]
    plain, remat = Steps(policy), Steps(policy, remat=True)
    contenders: dict[str, Contender] = {
        "ours": lambda _: plain.run(plain.shared, [batch]),
        "unshared": lambda _: plain.run(plain.unshared, [rows]),
        "tunix": tunix.updates(list(prompts), list(completions)),
        "ours_remat": lambda _: remat.run(remat.shared, [batch]),
        "unshared_remat": lambda _: remat.run(remat.unshared, [rows]),
    }
    seconds = take_turns(contenders, repeats)
    bytes_of = {
        name: (steps.memory(steps.shared, batch), steps.memory(steps.unshared, rows))
        for name, steps in (("memory", plain), ("memory_remat", remat))
    }
    return {
        "unshared": seconds["unshared"] / seconds["ours"],
        "tunix": seconds["tunix"] / seconds["ours"],
        "unshared_remat": seconds["unshared_remat"] / seconds["ours_remat"],
        **{name: unshared / ours for name, (ours, unshared) in bytes_of.items()},
    }


def signal_part(repeats: int) -> dict[str, float]:
    """Most groups without a gradient: left out, or run all the same."""
    groups, steps = random_groups(MANY, silent=MANY - WITH_SIGNAL), Steps(new_policy())
    seconds = take_turns(
        {
            "ours": lambda _: steps.run(
                steps.shared, pack([g for g in groups if g.has_signal], SHAPES)
            ),
            "all": lambda _: steps.run(steps.shared, pack(groups, SHAPES)),
        },
        repeats,
    )
    return {"zero_advantage_70": seconds["all"] / seconds["ours"]}


PARTS = {"prefix": prefix_part, "signal": signal_part}

HEADER = f"""# The update step, measured

Written by `python benchmarks/update.py --table FILE`, which says what each contender does. Times and
memory are ratios: how many times less ours needs. {GROUPS} groups of a prefix of {PREFIX} tokens and
{ROWS} suffixes of {SUFFIX}; 4 layers, 256 wide, 8 heads, 4 key-value heads, vocabulary 512, float32.

- `unshared`: the same loss where each row is a sequence of its own; `tunix`: google-tunix's GRPO step.
- `memory`: temporary bytes of the compiled gradient against the unshared one's. Ours has 4.5 times fewer
  tokens, and always computes attention scores anew in the backward pass; the unshared one keeps them, as
  plain differentiation does. `_remat`: whole layers are recomputed, on both sides.
- `zero_advantage_70`: {MANY} groups of which {MANY - WITH_SIGNAL} have no gradient: left out, or run
  all the same.

"""

if __name__ == "__main__":
    run_parts(__doc__, HEADER, PARTS, ("jax", "flax"))
