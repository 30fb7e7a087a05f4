"""What a sampler refuses before anything runs; each message says what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxreset.models.policy import Policy
from jaxreset.sampling.rounds import Snapshot
from jaxreset.spelling import silent_ids


def check_prompts(
    prompts: Sequence[np.ndarray],
    vocab: int,
    *,
    kept: Sequence[int] | None = None,
    **per_prompt: Sequence[int] | None,
) -> None:
    """Arguments of one length, tokens of the vocabulary, and no more kept than there is."""
    for name, values in ({"kept": kept} | per_prompt).items():
        if values is not None and len(values) != len(prompts):
            raise ValueError(
                f"{name}: {len(values)} values, expected one for each of the {len(prompts)} prompts"
            )
    counts = [0] * len(prompts) if kept is None else kept
    for n, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        if len(prompt) and not 0 <= prompt.min() <= prompt.max() < vocab:
            raise ValueError(
                f"prompts: number {n} has ids from {prompt.min()} to {prompt.max()}, expected 0 to "
                f"{vocab - 1}, the vocabulary"
            )
        if not 0 <= count <= len(prompt):
            raise ValueError(f"kept: {count} of prompt {n}, expected 0 to its {len(prompt)} tokens")


def check_patterns(policy: Policy, **patterns: str | None) -> None:
    """Of tokens that texts show: a step's end is looked for in the same text as its verifier reads."""
    for id_ in {*policy.eos_ids, *silent_ids(policy.tokenizer)}:
        token: Any = policy.tokenizer.convert_ids_to_tokens(id_)
        for name, text in patterns.items():
            if text and token and token in text:
                raise ValueError(
                    f"{name}={text!r}: {token!r} begins, ends or pads a text and is left out of it; choose "
                    "another"
                )


def check_policy(vocab: int, known: int) -> None:
    """The step table knows the tokens that the policy draws."""
    if vocab != known:
        raise ValueError(
            f"policy: its vocabulary is {vocab}, the sampler's step table is for {known}; make a "
            "sampler for this policy"
        )


def check_snapshots(snapshots: Sequence[Snapshot], policy: Policy) -> None:
    """All of one round, inside their rows, and drawn by this policy's weights."""
    if not snapshots:
        raise ValueError("snapshots: none given, expected at least one to resume")
    parent = snapshots[0].round
    for s in snapshots:
        if s.round is not parent:
            raise ValueError("snapshots: expected all of one round; resume each round by itself")
        longest = len(parent.prefixes[s.group]) + int(parent.lengths[s.group, s.row])
        if not parent.prompt_lengths[s.group] <= s.length <= longest:
            raise ValueError(
                f"snapshot length {s.length}: row {s.row} of group {s.group} has a prompt of "
                f"{parent.prompt_lengths[s.group]} tokens and ends at {longest}"
            )
    if parent.version != policy.version:
        raise ValueError(
            f"snapshots were drawn by weights of version {parent.version}, the policy is at "
            f"version {policy.version}: their keys and values are stale; sample again"
        )
    # Versions count from 0 in every policy. What has been freed is nobody's: a dead reference is None.
    drew = [reference() for reference in parent.weights]
    ours = jax.tree.leaves(policy.params)
    if drew and (
        len(drew) != len(ours) or any(a is not b for a, b in zip(drew, ours, strict=True))
    ):
        raise ValueError(
            f"snapshots were drawn by other weights than the policy's, though both are of version "
            f"{policy.version}: their keys and values aren't its own; resume with the policy that "
            "sampled, or sample again"
        )


def check_questions(
    questions: Sequence[np.ndarray], snapshots: int, most_tokens: int, vocab: int
) -> None:
    """One for each snapshot, not empty, not too long, in the vocabulary."""
    if len(questions) != snapshots:
        raise ValueError(
            f"questions: {len(questions)}, expected one for each of {snapshots} snapshots"
        )
    lengths = [len(q) for q in questions]
    if not 1 <= min(lengths) <= max(lengths) <= most_tokens:
        raise ValueError(
            f"questions: of {min(lengths)} to {max(lengths)} tokens, expected 1 to "
            f"question_tokens={most_tokens}"
        )
    check_prompts(questions, vocab)


def check_draws(temperature: float, top_p: float, top_k: int, max_new: int | None) -> None:
    """In the ranges that mean something."""
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}, top_k={top_k}: expected temperature >= 0, "
            "0 < top_p <= 1 and top_k >= 0"
        )
    if max_new is not None and max_new < 1:
        raise ValueError(f"max_new={max_new}: expected at least 1")
