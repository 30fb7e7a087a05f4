"""Where the steps of a response begin and end, decided on token ids.

A response is a sequence of steps, each ended by a delimiter. Re-encoding text would move token
boundaries, so steps are found on the ids themselves: a table over (state, token), built once from
the bytes of the tokenizer's vocabulary, says which patterns end inside each token. The state
carries over from token to token, so a delimiter that spans several tokens, or shares one with the
text around it, is found exactly.

The occurrences of a pattern are those of a left-to-right, non-overlapping search of its bytes in
the whole response (as with `bytes.find`, each search going on where the last occurrence ended).
A step ends after the token in which an occurrence of the delimiter ends, and all of that token
belongs to it, even where its last bytes begin the next step's text; several occurrences that end
in one token make one boundary. A step also ends at a fixed number of tokens. Neither resets the
search: an occurrence may begin in one step and end in the next.

A delimiter always ends a step, even an empty one. What follows the last delimiter is a step only if
it holds more than white space and end-of-sequence tokens.

    vocab = spelling.token_bytes(tokenizer)
    automaton = build_automaton(vocab, delimiter="</thought>", answer_marker="\\\\boxed{")
    spans = split_steps(automaton, response, max_step_tokens=256, eos_ids=[eos_id])

The module needs numpy alone: `advance` uses the operators of the arrays that it is given, NumPy's
or JAX's, so the same lines run on the host and inside `jax.jit`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy's or jax's, traced or not

DELIMITER, ANSWER, STOP = 1, 2, 4  # bits of StepAutomaton.events

_MAX_STATES = np.iinfo(np.int16).max + 1


class StepAutomaton(NamedTuple):
    """The step table, a pytree. A jitted function takes it as an argument, not as a constant.

    next_state: [states, vocab] int16, the state after a token. A response starts in state 0.
    events: [states, vocab] uint8, the bits DELIMITER, ANSWER, STOP of what ends inside the token.
    blank: [places, vocab] uint8, how far into white space a token leads, see `_white_space`. Only
      `split_steps` reads it, so it is None on a device.
    """

    next_state: Array
    events: Array
    blank: Array | None = None


class Progress(NamedTuple):
    """How far each row has come. All fields have the batch's shape; a response starts from zeros.

    state: int32, the automaton's state.
    steps: int32, the number of finished steps.
    step_tokens: int32, the number of tokens in the unfinished step.
    answered: bool, whether the answer marker has occurred.
    """

    state: Array
    steps: Array
    step_tokens: Array
    answered: Array


def advance(
    automaton: StepAutomaton, progress: Progress, token: Array, *, max_step_tokens: Array
) -> tuple[Progress, Array, Array]:
    """One token further, for one row or a batch of rows, on numpy or on traced jax arrays.

    Args:
      automaton: the step table; jax arrays where `token` is traced.
      progress: [...] where each row is.
      token: [...] integer ids, below the table's vocabulary size (a traced id can't be checked).
      max_step_tokens: at so many tokens a step ends without a delimiter; at least 1, maybe traced.

    Returns:
      The new progress (same shapes and dtypes), [...] bool whether a step ended with this token,
      and [...] bool whether a stop string ended in it.
    """
    state = automaton.next_state[progress.state, token].astype(np.int32)
    events = automaton.events[progress.state, token]
    step_tokens = progress.step_tokens + 1
    step_ended = ((events & DELIMITER) != 0) | (step_tokens >= max_step_tokens)
    after = Progress(
        state=state,
        steps=progress.steps + step_ended,
        step_tokens=step_tokens * ~step_ended,
        answered=progress.answered | ((events & ANSWER) != 0),
    )
    return after, step_ended, (events & STOP) != 0


def replay(
    automaton: StepAutomaton, tokens: Sequence[int] | np.ndarray, *, max_step_tokens: int
) -> Progress:
    """Progress (numpy scalars) after a response, as `advance` from its start gives it. Host only.

    Args:
      automaton: the step table, in numpy.
      tokens: [T] integer ids of one response, without its prompt and without padding.
      max_step_tokens: at so many tokens a step ends without a delimiter.

    Raises:
      ValueError: tokens that aren't one row of integers, or outside the table's vocabulary;
        max_step_tokens below 1.
    """
    return _walk(automaton, tokens, max_step_tokens)[0]


def split_steps(
    automaton: StepAutomaton,
    tokens: Sequence[int] | np.ndarray,
    *,
    max_step_tokens: int,
    eos_ids: Iterable[int] = (),
) -> list[tuple[int, int]]:
    """The steps of a response, as spans [start, end) of its tokens. Host only.

    The spans follow one another without gaps, from 0 to the end of the response, but for its tail
    of white space: tokens behind the last delimiter that hold nothing but white space (Unicode's, as
    `str.isspace` has it), end-of-sequence tokens and tokens without bytes are no step, nor part of
    one, and the last span ends before them. So a response of nothing else has no steps.

    `Progress.steps` counts the steps that have ended, while it can't be known whether more than white
    space will follow: it may be larger by those that ended in the tail at `max_step_tokens`, and it
    is smaller by one where the last step was not ended.

    Args:
      automaton: the step table, in numpy.
      tokens: [T] integer ids of one response, without its prompt and without padding.
      max_step_tokens: at so many tokens a step ends without a delimiter.
      eos_ids: the ids of the end-of-sequence tokens.

    Raises:
      ValueError: as `replay`.
    """
    _, ends, delimited = _walk(automaton, tokens, max_step_tokens)
    eos = set(eos_ids)
    for count in range(delimited, len(ends) + 1):
        tail = ends[count - 1] if count else 0
        if _is_blank(automaton, tokens[tail:], eos):
            ends = ends[:count]
            break
    else:
        ends.append(len(tokens))
    return list(zip([0, *ends], ends, strict=False))


def _is_blank(automaton: StepAutomaton, tokens: Iterable[int], eos: set[int]) -> bool:
    """Whether these tokens, those of `eos` left out, are white space or nothing."""
    place = 0
    for token in map(int, tokens):
        if token in eos:
            continue
        if automaton.blank is None:
            return False
        place = int(automaton.blank[place, token])
        if place == len(automaton.blank) - 1:
            return False
    return place == 0


def _walk(
    automaton: StepAutomaton, tokens: Sequence[int] | np.ndarray, max_step_tokens: int
) -> tuple[Progress, list[int], int]:
    """`advance` over one response, in plain integers for speed.

    Returns:
      The progress, each step's end, and how many steps there are up to the last delimiter.
    """
    if max_step_tokens < 1:
        raise ValueError(f"max_step_tokens={max_step_tokens}: expected at least 1")
    size = automaton.next_state.shape[1]
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"tokens: expected one row of ids, got shape {ids.shape}, {ids.dtype}")
    if ids.size and not 0 <= ids.min() <= ids.max() < size:
        raise ValueError(
            f"tokens: ids from {ids.min()} to {ids.max()}, but the step automaton knows 0 to "
            f"{size - 1}; build it with the model's vocab_size"
        )
    state, start, answered, delimited = 0, 0, False, 0
    ends: list[int] = []
    for end, token in enumerate(ids.tolist(), start=1):
        events = int(automaton.events[state, token])
        state = int(automaton.next_state[state, token])
        answered = answered or bool(events & ANSWER)
        if events & DELIMITER or end - start >= max_step_tokens:
            ends.append(end)
            start = end
        if events & DELIMITER:
            delimited = len(ends)
    progress = Progress(
        state=np.int32(state),
        steps=np.int32(len(ends)),
        step_tokens=np.int32(ids.size - start),
        answered=np.bool_(answered),
    )
    return progress, ends, delimited


def build_automaton(
    vocab: Sequence[bytes],
    *,
    delimiter: str,
    answer_marker: str | None = None,
    stop_strings: Sequence[str] = (),
    vocab_size: int | None = None,
) -> StepAutomaton:
    """Builds the step table, in numpy, from the bytes of each token.

    Each pattern has a Knuth-Morris-Pratt automaton that starts again after a match. Their joint
    states are those that some text reaches, about as many as the patterns have bytes; the bytes of
    each token are run from each of them.

    Args:
      vocab: each token's bytes, by id, as `spelling.token_bytes` gives; a token without any changes
        nothing.
      delimiter: ends a step.
      answer_marker: marks the step that holds the answer, or None.
      stop_strings: end a response. One that the vocabulary cannot write never occurs.
      vocab_size: the model's vocabulary, where it is padded; ids from len(vocab) on have no bytes.

    Raises:
      ValueError: an empty pattern; a delimiter or an answer marker that no sequence of tokens can
        write; a vocab_size below len(vocab); more states than int16 holds.
      TypeError: stop_strings that is one string.
    """
    if isinstance(stop_strings, str):
        raise TypeError(f"stop_strings={stop_strings!r}: expected a sequence of strings, not one")
    named = [("delimiter", delimiter, DELIMITER)]
    if answer_marker is not None:
        named.append(("answer_marker", answer_marker, ANSWER))
    named += [(f"stop_strings[{i}]", stop, STOP) for i, stop in enumerate(stop_strings)]
    for name, text, _ in named:
        if not text:
            raise ValueError(f"{name}={text!r}: expected at least one character")
    size = len(vocab) if vocab_size is None else vocab_size
    if size < len(vocab):
        raise ValueError(
            f"vocab_size={size}: expected at least the tokenizer's {len(vocab)} tokens; give the "
            "number of rows of the model's embedding"
        )

    byte_next, byte_events = _joint_matcher([(text.encode(), bit) for _, text, bit in named])
    automaton = StepAutomaton(
        *_lift(byte_next, byte_events, vocab, size),
        blank=_lift(*_white_space(), vocab, size)[0].astype(np.uint8),
    )
    possible = _possible_events(automaton)
    for name, text, bit in named:
        if bit != STOP and not possible & bit:
            raise ValueError(
                f"{name}={text!r}: no sequence of the vocabulary's {len(vocab)} tokens writes it "
                "(tokens that begin, end or pad a text have no bytes); choose one that the tokenizer "
                "can write"
            )
    return automaton


def _joint_matcher(patterns: Sequence[tuple[bytes, int]]) -> tuple[np.ndarray, np.ndarray]:
    """All patterns' automata in one: next state [states, 256] int16, events [states, 256] uint8."""
    matchers = [_matcher(pattern) for pattern, _ in patterns]
    used = sorted(set(b"".join(pattern for pattern, _ in patterns)))
    ids = {(0,) * len(patterns): 0}
    order = list(ids)
    next_rows, event_rows = [], []
    for joint in order:  # grows while we walk it: breadth-first
        next_row, event_row = np.zeros(256, np.int16), np.zeros(256, np.uint8)
        for byte in used:  # every other byte leads back to the start
            after = []
            for (pattern, bit), matcher, state in zip(patterns, matchers, joint, strict=True):
                matched = matcher[state][byte]
                if matched == len(pattern):
                    event_row[byte] |= bit
                    matched = 0  # occurrences don't overlap
                after.append(matched)
            key = tuple(after)
            if key not in ids:
                if len(ids) == _MAX_STATES:
                    raise ValueError(
                        "delimiter, answer_marker and stop_strings together need more than "
                        f"{_MAX_STATES} states; give fewer or shorter stop_strings"
                    )
                ids[key] = len(ids)
                order.append(key)
            next_row[byte] = ids[key]
        next_rows.append(next_row)
        event_rows.append(event_row)
    return np.stack(next_rows), np.stack(event_rows)


def _matcher(pattern: bytes) -> list[list[int]]:
    """Knuth-Morris-Pratt: [bytes matched][byte] -> bytes matched, len(pattern) at an occurrence."""
    table = [[0] * 256]
    table[0][pattern[0]] = 1
    border = 0  # the state after the matched bytes but the first: where a mismatch goes on
    for matched, byte in enumerate(pattern[1:], start=1):
        row = table[border].copy()
        border = row[byte]
        row[byte] = matched + 1
        table.append(row)
    return table


def _white_space() -> tuple[np.ndarray, np.ndarray]:
    """Where white space stands after a byte: next place [places, 256] int16, and no events.

    Place 0 is between two characters; those that follow are inside one that takes several bytes in
    UTF-8; the last is reached, and never left, with anything that isn't white space.
    """
    characters = [chr(code).encode() for code in range(0x3001) if chr(code).isspace()]
    begun = sorted({char[:size] for char in characters for size in range(len(char))})
    other = len(begun)
    table = np.full((other + 1, 256), other, np.int16)
    for char in characters:
        for size, byte in enumerate(char):
            ended = size + 1 == len(char)
            table[begun.index(char[:size]), byte] = 0 if ended else begun.index(char[: size + 1])
    return table, np.zeros(table.shape, np.uint8)


def _lift(
    byte_next: np.ndarray, byte_events: np.ndarray, vocab: Sequence[bytes], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Runs every token's bytes from every state: all tokens at once, one byte position a time.

    Returns:
      [states, size] the state after each token, int16, and the events on the way, uint8.
    """
    lengths = np.array([len(token) for token in vocab], np.int64)
    order = np.argsort(-lengths, kind="stable")  # longest first: each position needs only a slice
    starts = (np.cumsum(lengths) - lengths)[order]
    negated = -lengths[order]
    data = np.frombuffer(b"".join(vocab), np.uint8)

    state = np.repeat(np.arange(len(byte_next), dtype=np.int16)[:, None], size, axis=1)
    events = np.zeros(state.shape, np.uint8)  # [states, vocab], as state
    for position in range(int(lengths.max(initial=0))):
        live = int(np.searchsorted(negated, -position))  # tokens with a byte at this position
        byte = data[starts[:live] + position]
        at = state[:, :live]
        events[:, :live] |= byte_events[at, byte]
        state[:, :live] = byte_next[at, byte]

    columns = np.arange(size)
    columns[order] = np.arange(len(vocab))  # back to the order of ids; padding stays at the end
    return state[:, columns], events[:, columns]


def _possible_events(automaton: StepAutomaton) -> int:
    """The event bits that some sequence of tokens causes, from the start of a response."""
    reached, order, bits = {0}, [0], 0
    for state in order:  # grows while we walk it
        bits |= int(np.bitwise_or.reduce(automaton.events[state], initial=0))
        new = set(np.unique(automaton.next_state[state]).tolist()) - reached
        reached |= new
        order += new
    return bits
