"""Rollouts and reset branches: ours against google-tunix, transformers, and our own plain ways.

    python benchmarks/sampling.py [--json FILE] [--table FILE] [--repeats N] [--only PART ...]

Every contender draws the same number of tokens from prompts of the same lengths with random weights of
the same sizes. They take turns, and each ratio is between medians. google-tunix gets a virtual
environment of its own, `benchmarks/.tunix`, made on the first run; transformers needs PyTorch here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
from common import SIZES, Contender, Tunix, new_policy, run_parts, take_turns

from jaxreset.models.policy import Policy
from jaxreset.sampling import schedule
from jaxreset.sampling.rounds import Round, Shape, Snapshot, StopRules, Stream
from jaxreset.sampling.sampler import Sampler
from jaxreset.steps import build_automaton

EMBEDDED = {"layers": 3, "width": 96, "heads": 4, "kv_heads": 4, "mlp": 192, "vocab": 28}
HALF_BILLION = {
    "layers": 24, "width": 896, "heads": 14, "kv_heads": 2, "mlp": 4864, "vocab": 151_936,
}  # fmt: skip
PROMPTS, ROWS, NEW = 4, 8, 128
RESET_GROUPS, RESET_ROWS, RESET_NEW = 8, 4, 32
CUTS = 40, 96
LONG = 512
QUESTION = 40  # tokens of a localiser's question, besides problem and attempt


def new_sampler(
    vocab: int,
    most: int,
    shapes: list[Shape],
    forks: list[tuple[Shape, Shape]] = (),
    **options: Any,
) -> Sampler:
    """A sampler whose rows end only at `most` tokens, or at one of `eos_ids`."""
    words = [b"\n", *(i.to_bytes(3) for i in range(1, vocab))]
    automaton = build_automaton(words, delimiter="\n", vocab_size=vocab)
    return Sampler(automaton, StopRules(most), shapes=shapes, forks=list(forks), **options)


def random_prompts(count: int, length: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(1, SIZES["vocab"], (count, length)))


def timed(draw: Callable[[int], Any]) -> Contender:
    """Seconds of a call that returns when its tokens are on the host."""

    def run(seed: int) -> float:
        start = time.perf_counter()
        draw(seed)
        return time.perf_counter() - start

    return run


def transformers_contender(prompts: list[np.ndarray], new: int) -> Contender:
    """`generate` of transformers' Qwen2 in PyTorch, sampling; its cache is on by default."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=SIZES["vocab"],
            hidden_size=SIZES["width"],
            intermediate_size=SIZES["mlp"],
            num_hidden_layers=SIZES["layers"],
            num_attention_heads=SIZES["heads"],
            num_key_value_heads=SIZES["kv_heads"],
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    tokens = torch.tensor(np.stack(prompts))
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "min_new_tokens": new}

    def run(seed: int) -> float:
        torch.manual_seed(seed)
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        seconds = time.perf_counter() - start
        assert out.shape[1] == tokens.shape[1] + new
        return seconds

    return run


def base_contender(policy: Policy, prompts: list[np.ndarray], rows: int) -> Contender:
    """Ours: `rows` rollouts of each prompt."""
    shape = Shape(len(prompts), rows, len(prompts[0]), NEW)
    sampler = new_sampler(SIZES["vocab"], NEW, [shape])
    return timed(lambda seed: sampler.sample(policy, prompts, rows=rows, stream=Stream(seed)))


def base_round(policy: Policy, tunix: Tunix, length: int) -> dict[str, Contender]:
    """A base round: each of a few prompts, several times."""
    prompts = random_prompts(PROMPTS, length)
    repeated = [p for p in prompts for _ in range(ROWS)]
    return {
        "ours": base_contender(policy, prompts, ROWS),
        "unshared": base_contender(policy, repeated, 1),
        "tunix": tunix.draws(repeated, NEW),
        "transformers": transformers_contender(repeated, NEW),
    }


def reset_round(policy: Policy, tunix: Tunix) -> dict[str, Contender]:
    """A reset round: every group goes back to another cut of a rollout that has been drawn."""
    longest = max(CUTS)
    base = Shape(RESET_GROUPS, RESET_ROWS, LONG, longest)
    child = Shape(RESET_GROUPS, RESET_ROWS, LONG + longest, RESET_NEW)
    sampler = new_sampler(SIZES["vocab"], LONG, [base, child], [(base, child)])
    prompts = random_prompts(RESET_GROUPS, LONG)
    options = {"rows": RESET_ROWS, "max_new": RESET_NEW}
    parent = sampler.sample(policy, prompts, rows=RESET_ROWS, stream=Stream(0), max_new=longest)

    def snapshots(seed: int) -> list[Snapshot]:
        cuts = np.random.default_rng(seed).integers(CUTS[0], CUTS[1] + 1, RESET_GROUPS)
        return [Snapshot(parent, g, g % RESET_ROWS, LONG + int(c)) for g, c in enumerate(cuts)]

    def resume(seed: int) -> None:
        sampler.resume(policy, snapshots(seed), stream=Stream(seed, phase=1), **options)

    def prefill_again(seed: int) -> None:
        states = snapshots(seed)
        kept = [s.length - LONG for s in states]
        tokens = [s.tokens for s in states]
        sampler.sample(policy, tokens, kept=kept, stream=Stream(seed, phase=1), **options)

    rows = [s.tokens for s in snapshots(0) for _ in range(RESET_ROWS)]
    return {
        "ours": timed(resume),
        "reprefill": timed(prefill_again),
        "tunix": tunix.draws(rows, RESET_NEW),
    }


def long_tail(policy: Policy) -> tuple[dict[str, Contender], dict[str, float]]:
    """Many rollouts through few slots, whose lengths have a long tail."""
    groups, slots, most = 128, 64, 512
    prompts = random_prompts(groups, 64)
    shape = Shape(groups, ROWS, 64, most)
    # A random policy draws each token about equally often: a median of 40 tokens until one of these.
    ends = {"eos_ids": range(1, 10)}
    tail = new_sampler(SIZES["vocab"], most, [shape], slots=slots, **ends)
    drawn = tail.sample(policy, prompts, rows=ROWS, stream=Stream(0))
    lengths, mean = drawn.lengths, round(float(drawn.lengths.mean()))
    equal = new_sampler(SIZES["vocab"], mean, [shape._replace(suffix=mean)], slots=slots)
    static = new_sampler(SIZES["vocab"], most, [shape._replace(groups=slots // ROWS)], **ends)
    batches = lengths.reshape(-1, slots)
    facts = {
        "rollouts": lengths.size,
        "median length": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "slot utilization": lengths.sum() / drawn.lane_steps,
        "slot utilization of a static batch": lengths.sum() / (batches.max(1).sum() * slots),
        "rows that share a prefix when it is read": lengths.sum() / drawn.prefix_reads,
    }

    def in_static_batches(seed: int) -> None:
        """As many rows at a time as there are slots, until the last of them has ended."""
        with patch.object(schedule, "MIN_LANES", slots * slots):  # so lanes stay as they are
            for first in range(0, groups, slots // ROWS):
                batch = slice(first, first + slots // ROWS)
                ids = range(groups)[batch]
                static.sample(policy, prompts[batch], rows=ROWS, stream=Stream(0), ids=ids)

    return {
        "ours": timed(lambda seed: tail.sample(policy, prompts, rows=ROWS, stream=Stream(0))),
        "equal": timed(lambda seed: equal.sample(policy, prompts, rows=ROWS, stream=Stream(0))),
        "static": timed(in_static_batches),
    }, facts


class Phases:
    """A step's sampling calls at lengths that are set: nothing ends early, every prompt is reset.

    Args:
      policy: random.
      prompts: how many.  prompt, response: their tokens.
      answer: tokens of the localiser's answer.
      inline: the question goes on from the failed attempt, else it is a prompt of its own.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        prompts: int,
        prompt: int,
        response: int,
        answer: int,
        inline: bool = False,
    ):
        self.policy, self.inline, vocab = policy, inline, policy.config.vocab
        rng = np.random.default_rng(0)
        self.prompts = list(rng.integers(1, vocab, (prompts, prompt)))
        # A question of its own holds the problem and the failed attempt too.
        attempt = prompt + response
        size = QUESTION if inline else attempt + QUESTION
        self.questions = list(rng.integers(1, vocab, (prompts, size)))
        whole = Shape(prompts, ROWS, prompt, response)
        base = whole._replace(rows=ROWS // 2)
        child = base._replace(prefix=attempt)
        self.sampler = new_sampler(vocab, response, [whole, base], [(base, child), (child, child)])
        asked = Shape(prompts, 1, attempt + QUESTION, answer)
        forks = [(base, asked), (child, asked)] if inline else []
        shapes = [] if inline else [asked]
        self.localizer = new_sampler(vocab, answer, shapes, forks, question_tokens=QUESTION)
        self.sampler.compile(policy)  # which lanes decode together differs from turn to turn
        self.localizer.compile(policy)

    def base(self, seed: int, rows: int) -> Round:
        """The first round."""
        return self.sampler.sample(self.policy, self.prompts, rows=rows, stream=Stream(seed))

    def localize(self, ends: list[Snapshot], stream: Stream) -> Round:
        """An answer about each attempt."""
        if self.inline:
            return self.localizer.resume(
                self.policy, ends, questions=self.questions, rows=1, stream=stream
            )
        return self.localizer.sample(self.policy, self.questions, rows=1, stream=stream)

    def reset(self, parent: Round, seed: int, rung: int) -> tuple[Round, int]:
        """Localise, then go back to a random place of each group's first row; the tokens drawn."""
        ends = [
            Snapshot(parent, group, 0, len(prefix) + int(parent.lengths[group, 0]))
            for group, prefix in enumerate(parent.prefixes)
        ]
        asked = self.localize(ends, Stream(seed, phase=1 + 2 * rung))
        rng = np.random.default_rng((seed, rung))
        snapshots = [
            end._replace(length=int(rng.integers(parent.prompt_lengths[end.group], end.length)))
            for end in ends
        ]
        stream = Stream(seed, phase=2 + 2 * rung)
        round_ = self.sampler.resume(self.policy, snapshots, rows=ROWS // 2, stream=stream)
        return round_, int(asked.lengths.sum() + round_.lengths.sum())

    def grpo(self, seed: int) -> float:
        start = time.perf_counter()
        self.base(seed, ROWS)
        return time.perf_counter() - start

    def srpo(self, seed: int) -> float:
        start = time.perf_counter()
        self.reset(self.base(seed, ROWS // 2), seed, 0)
        return time.perf_counter() - start

    def base_per_token(self, seed: int) -> float:
        start = time.perf_counter()
        round_ = self.base(seed, ROWS // 2)
        return (time.perf_counter() - start) / int(round_.lengths.sum())

    def ladder_per_token(self, seed: int) -> float:
        start = time.perf_counter()
        round_ = self.base(seed, ROWS // 2)
        tokens = int(round_.lengths.sum())
        for rung in range(3):
            round_, more = self.reset(round_, seed, rung)
            tokens += more
        return (time.perf_counter() - start) / tokens


def base_part(repeats: int) -> dict[str, float]:
    policy, tunix, ratios = new_policy(), Tunix(), {}
    for length in (64, LONG):
        seconds = take_turns(base_round(policy, tunix, length), repeats)
        ours = seconds.pop("ours")
        ratios |= {f"{name}_p{length}": value / ours for name, value in seconds.items()}
    seconds = take_turns(reset_round(policy, tunix), repeats)
    ours = seconds.pop("ours")
    return ratios | {f"reset_{name}_p{LONG}": value / ours for name, value in seconds.items()}


def tail_part(repeats: int) -> dict[str, float]:
    contenders, facts = long_tail(new_policy())
    seconds = take_turns(contenders, min(repeats, 3))
    ratios = {
        "tail_over_equal": seconds["ours"] / seconds["equal"],
        "static_over_equal": seconds["static"] / seconds["equal"],
    }
    return ratios | {f"tail: {name}": value for name, value in facts.items()}


def phase_ratios(
    policy: Policy, repeats: int, name: str, *, quick: bool = False, **sizes: int
) -> dict[str, float]:
    """SRPO's and the ladder's sampling, by the localiser's kind and the length of its answers."""
    short, inline = (Phases(policy, answer=16, inline=inline, **sizes) for inline in (False, True))
    srpo = {"": short.srpo, "_inline": inline.srpo}
    if not quick:
        srpo["_a512"] = Phases(policy, answer=512, **sizes).srpo
    seconds = take_turns(srpo | {"grpo": short.grpo}, repeats)
    ratios = {f"srpo_over_grpo{name}{kind}": seconds[kind] / seconds["grpo"] for kind in srpo}
    if quick:
        return ratios
    ladder = {"": short.ladder_per_token, "_inline": inline.ladder_per_token}
    seconds = take_turns(ladder | {"base": short.base_per_token}, repeats)
    return ratios | {
        f"ladder_over_base{name}{kind}": seconds[kind] / seconds["base"] for kind in ladder
    }


def phases_part(repeats: int) -> dict[str, float]:
    """The embedded task's sizes, at its own lengths and at long ones."""
    small = new_policy(EMBEDDED)
    ratios = phase_ratios(small, repeats, "", prompts=32, prompt=13, response=56)
    return ratios | phase_ratios(
        small, min(repeats, 3), "_r512", prompts=32, prompt=13, response=LONG
    )


def large_part(repeats: int) -> dict[str, float]:
    """A model of half a billion parameters; one turn takes long."""
    large = new_policy(HALF_BILLION)
    sizes = {"prompts": 8, "prompt": 32, "response": 64}
    return phase_ratios(large, 1, "_0.5b", quick=True, **sizes)


PARTS = {"base": base_part, "tail": tail_part, "phases": phases_part, "large": large_part}


HEADER = """# Sampling, measured

Written by `python benchmarks/sampling.py --table FILE`, which says what each contender draws.

- `X_pN`: how many times faster our round is than X's at prompts of N tokens: 4 layers, 256 wide, 8 heads,
  4 key-value heads, vocabulary 512, float32, 4 prompts × 8 rows of 128 tokens. `unshared` is ours without
  shared prefixes.
- `reset_X_pN`: the same of a reset round: 8 groups of 4 rows, cut after 40 to 96 tokens, 32 new ones.
- `tail_over_equal`: a token's cost in 1,024 rollouts of very unlike lengths through 64 slots, over that at
  equal lengths; `static_over_equal`: of the same rollouts in batches of 64 that wait for their last row.
- `srpo_over_grpo`: the cost of SRPO's sampling (base, localise, reset) over that of GRPO's one round, with
  answers of 16 tokens; `_inline` where the question stands behind the attempt, `_a512` with answers of 512
  tokens. 32 prompts × 8 rows on the embedded task's model, responses of 56 tokens; `_r512`: of 512.
  `_0.5b`: 8 prompts × 8 rows on a model of half a billion parameters, responses of 64 tokens, one turn.
- `ladder_over_base`: a token's cost in a ladder of three rungs, over that in the base round.

"""


if __name__ == "__main__":
    run_parts(__doc__, HEADER, PARTS, ("jax", "flax", "transformers", "torch"))
