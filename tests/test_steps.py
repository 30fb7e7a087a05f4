"""Step boundaries on token ids, held against a plain search of the decoded bytes."""

import bisect
import copy
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxreset import steps
from jaxreset.spelling import token_bytes

THOUGHT, BOXED = "</thought>", "\\boxed{"
DELIMITERS = (THOUGHT, "\n", "\n\n", "aab")
STOPS = ("Question:", "\n\n\n")
repeatable = settings(derandomize=True, deadline=None, max_examples=150)


def search(data: bytes, pattern: bytes) -> list[int]:
    """Where the left-to-right, non-overlapping occurrences end."""
    found, at = [], data.find(pattern)
    while at >= 0:
        found.append(at + len(pattern))
        at = data.find(pattern, found[-1])
    return found


def expected(vocab, tokens, delimiter, max_step_tokens):
    """By search, for each token: step ended, steps, step_tokens, answered, stopped."""
    cumulative = np.cumsum([len(vocab[token]) for token in tokens]).tolist()
    data = b"".join(vocab[token] for token in tokens)

    def tokens_where(pattern):
        return {bisect.bisect_left(cumulative, end) for end in search(data, pattern.encode())}

    boundaries, answers = tokens_where(delimiter), tokens_where(BOXED)
    stops = set().union(*map(tokens_where, STOPS))
    rows, finished, count = [], 0, 0
    for i in range(len(tokens)):
        count += 1
        ended = i in boundaries or count == max_step_tokens
        finished, count = finished + ended, count * (not ended)
        rows.append((ended, finished, count, min(answers, default=i + 1) <= i, i in stops))
    return rows


def search_boundaries(vocab, tokens, delimiter):
    """By search, the numbers of tokens behind which the delimiter has just occurred."""
    cumulative = np.cumsum([len(vocab[token]) for token in tokens]).tolist()
    found = search(b"".join(vocab[token] for token in tokens), delimiter.encode())
    return {bisect.bisect_left(cumulative, end) + 1 for end in found}


def text_of(vocab, tokens):
    return b"".join(vocab[token] for token in tokens).decode(errors="replace")


def start(shape=()):
    zeros = np.zeros(shape, np.int32)
    return steps.Progress(zeros, zeros, zeros, np.zeros(shape, bool))


def walk(automaton, tokens, max_step_tokens):
    """`advance` over one response, in the form of `expected`; and its last progress."""
    progress, rows = start(), []
    for token in tokens:
        progress, ended, stopped = steps.advance(
            automaton, progress, token, max_step_tokens=max_step_tokens
        )
        _, finished, count, answered = progress
        rows.append(tuple(x.item() for x in (ended, finished, count, answered, stopped)))
    return rows, progress


def fast(model, *, pre_tokenizer=None, decoder=None, added=(), **special):
    tokenizer = tokenizers.Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_tokens(list(added))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def decode(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


SYLLABLES = ["ma", "strö", "ki", "len", "du", "ga"]
WORDS = ["".join(parts) for parts in itertools.product(SYLLABLES, repeat=3)]
CORPUS = [
    f"Question: add {n} {word} and {word[::-1]}.\n\nThe tens give “{n}”.</thought>\nSo far: {n * n}"
    f" {word * 2}.</thought>\n\n\nThe answer is \\boxed{{{8 * n}}} 数 aab aaab.</thought>\n"
    for n, word in enumerate(WORDS)
]


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE of 600 tokens that splits as Qwen's: punctuation takes newlines along."""
    split = tokenizers.Regex(r"\s?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    return fast(
        trained.model,
        pre_tokenizer=pre_tokenizer,
        decoder=decoders.ByteLevel(),
        added=["<tool_call>", "a\nb"],
        eos_token="<eos>",
    )


@pytest.fixture(scope="module")
def bpe_vocab(byte_level):
    return token_bytes(byte_level)


# All bytes, then tokens that hold the end of one step and the start of the next, and worse.
CRAFTED = [b">\n</tho", b"ught>\n</thought>", b"</thought></thought></th", b"ht>\\box", b"ed{\n"]
CRAFTED += [b"xed{}</", b"\n\n\n", b"\n\n\n\n\nQuest", b"ion:"]
CRAFTED += [b"aa", b"aaa", b"ab", b"aabaab", b""]
SYNTHETIC = [bytes([byte]) for byte in range(256)] + CRAFTED

# Spellings of these stand among arbitrary ids, which alone would never write a pattern.
PIECES = st.sampled_from(["</thought>", "\n", "\n\n", "\\boxed{", "aab", "a", "</th", "Question:"])


def responses(vocab):
    """Token sequences in which patterns occur, cut into tokens in all ways that there are."""
    ids_of = {}
    for id_, token in enumerate(vocab):
        ids_of.setdefault(token, id_)
    hot = [i for token, i in ids_of.items() if any(c in token for c in b"<>\n\\{a:")]

    @st.composite
    def spelled(draw):
        data, tokens = "".join(draw(st.lists(PIECES, min_size=1, max_size=4))).encode(), []
        while data:
            fitting = [n for n in range(1, len(data) + 1) if data[:n] in ids_of]
            cut = draw(st.sampled_from(fitting))
            tokens.append(ids_of[data[:cut]])
            data = data[cut:]
        return tokens

    anything = st.lists(
        st.one_of(st.sampled_from(hot), st.integers(0, len(vocab) - 1)), min_size=1, max_size=4
    )
    segments = st.lists(st.one_of(spelled(), anything), max_size=8)
    return segments.map(lambda parts: [token for part in parts for token in part])


@functools.cache
def table(vocab: tuple[bytes, ...], delimiter: str) -> steps.StepAutomaton:
    return steps.build_automaton(
        vocab, delimiter=delimiter, answer_marker=BOXED, stop_strings=STOPS, vocab_size=700
    )


@pytest.mark.parametrize("delimiter", DELIMITERS)
@pytest.mark.parametrize("crafted", [False, True])
def test_against_search(bpe_vocab, crafted, delimiter):
    vocab = SYNTHETIC if crafted else bpe_vocab
    automaton = table(tuple(vocab), delimiter)

    @repeatable
    @given(responses(vocab), st.sampled_from([1, 5, 1000]))
    def check(tokens, limit):
        want = expected(vocab, tokens, delimiter, limit)
        got, progress = walk(automaton, tokens, limit)
        assert got == want

        replayed = steps.replay(automaton, tokens, max_step_tokens=limit)
        assert replayed == progress
        assert [x.dtype for x in replayed] == [np.int32, np.int32, np.int32, np.bool_]

        boundaries = [0, *(i + 1 for i, row in enumerate(want) if row[0])]
        delimited = search_boundaries(vocab, tokens, delimiter)
        # Up to the first boundary, from the last delimiter on, that only white space follows.
        tails = [end for end in boundaries if end >= max(delimited, default=0)]
        blank = [end for end in tails if not text_of(vocab, tokens[end:]).strip()]
        kept = (
            [end for end in boundaries if end <= blank[0]] if blank else [*boundaries, len(tokens)]
        )
        spans = steps.split_steps(automaton, tokens, max_step_tokens=limit)
        assert spans == list(itertools.pairwise(kept))

    check()


def test_trained_tokens_share_the_delimiter_with_other_text(byte_level, bpe_vocab):
    tokens = byte_level.encode("1.</thought>\n2", add_special_tokens=False)
    spelled = [bpe_vocab[token] for token in tokens]
    assert spelled == [b"1", b".</", b"thought", b">\n", b"2"]
    automaton = table(tuple(bpe_vocab), THOUGHT)
    assert steps.split_steps(automaton, tokens, max_step_tokens=256) == [(0, 4), (4, 5)]


def ids(*tokens: bytes) -> list[int]:
    """Ids in SYNTHETIC; a token that isn't in it is spelled byte by byte."""
    out = []
    for token in tokens:
        out += [SYNTHETIC.index(token)] if token in SYNTHETIC else list(token)
    return out


def ends(delimiter, tokens, limit=1000):
    automaton = table(tuple(SYNTHETIC), delimiter)
    return [end for _, end in steps.split_steps(automaton, tokens, max_step_tokens=limit)]


@pytest.mark.parametrize(
    ("delimiter", "tokens", "want"),
    [
        # the token with the delimiter's last byte belongs to the ended step, whatever follows
        (THOUGHT, ids(b"x</thought", b">\n</tho", b"ught>\n</thought>", b"y"), [11, 12, 13]),
        (THOUGHT, ids(b"</thought></thought></th", b"ought>", b"y"), [1, 7, 8]),
        ("aab", ids(b"aaab", b"c"), [4, 5]),
        ("aab", ids(b"aaa", b"ab", b"c"), [2, 3]),
        ("aab", ids(b"aabaab", b"aa", b"ab"), [1, 3]),
        # occurrences don't overlap, in one token or over several
        ("\n\n", ids(b"\n", b"\n", b"\n", b"x"), [2, 4]),
        ("\n\n", ids(b"\n\n\n", b"\n", b"x"), [1, 2, 3]),
        ("\n\n", ids(b"\n\n\n", b"x", b"\n"), [1, 3]),
        ("\n\n", ids(b"", b"\n", b"", b"\n", b"", b"x"), [4, 6]),
    ],
)
def test_boundaries(delimiter, tokens, want):
    assert ends(delimiter, tokens) == want


def test_answer_is_sticky_and_stop_is_not():
    automaton = table(tuple(SYNTHETIC), THOUGHT)
    tokens = ids(b"ht>\\box", b"ed{\n", b"Quest", b"ion:", b"\n\n\n", b"y")
    rows, _ = walk(automaton, tokens, 1000)
    assert [row[3] for row in rows] == [False] + [True] * 9
    assert [row[4] for row in rows] == [False] * 7 + [True, True, False]


def test_a_step_ends_at_max_step_tokens():
    tokens = ids(b"abcdefg", b"\n", b"xyz")
    assert ends("\n", tokens, limit=3) == [3, 6, 8, 11]
    assert ends("\n", tokens, limit=7) == [7, 8, 11]
    assert ends("\n", tokens, limit=8) == [8, 11]
    # the search goes on over such a boundary
    assert ends("\n\n", ids(b"xy", b"\n", b"\n", b"z"), limit=3) == [3, 4, 5]
    with pytest.raises(ValueError, match="max_step_tokens=0"):
        ends("\n", tokens, limit=0)


def test_end_of_sequence_tokens_alone_are_no_step():
    eos, other = 699, 698  # both in the padding of the table

    def spans(tokens):
        automaton = table(tuple(SYNTHETIC), "\n")
        return steps.split_steps(automaton, tokens, max_step_tokens=5, eos_ids=[eos, other])

    assert spans([]) == []
    assert spans([eos]) == []
    assert spans(np.array([*ids(b"ab\n"), eos, other])) == [(0, 3)]
    assert spans([*ids(b"ab\nc"), eos]) == [(0, 3), (3, 5)]
    assert spans([*ids(b"ab\n"), eos, *b"c"]) == [(0, 3), (3, 5)]
    assert spans([*ids(b"abcd"), eos]) == [(0, 5)]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("one</thought>two</thought>\n\n<eos>", 2),
        ("one</thought>two</thought> \t\r\n\x0b\x0c<eos>", 2),
        ("one</thought>two</thought>\u3000\u2028\xa0<eos>", 2),  # of two and three bytes each
        ("one</thought>two</thought>\n<pad>\n<eos>\n<eos>", 2),
        ("one</thought>two</thought>\n\n", 2),  # cut before the end of the sequence
        ("one</thought>two</thought>", 2),
        ("one</thought>\n\n</thought>two</thought>\n<eos>", 3),  # a delimiter ends an empty step
        ("one</thought>two</thought></thought>\n<eos>", 3),
        ("one</thought>two</thought>\n.<eos>", 3),
        ("one</thought>two</thought>\u200b<eos>", 3),  # no white space to Python
        ("one</thought>two</thought>\n</thou<eos>", 3),
        ("one</thought>two", 2),
        ("\n \n<eos>", 0),
        ("</thought>\n<eos>", 1),
        ("", 0),
    ],
)
@pytest.mark.parametrize("limit", [4, 1000])
def test_white_space_behind_the_last_delimiter_is_no_step(text, count, limit):
    vocab = [*SYNTHETIC, b"", b""]
    eos, pad = len(vocab) - 2, len(vocab) - 1
    tokens = []
    for part in re.split("(<eos>|<pad>|</thought>)", text):
        special = {"<eos>": [eos], "<pad>": [pad]}
        tokens += special.get(part, list(part.encode()))
    automaton = steps.build_automaton(vocab, delimiter=THOUGHT)
    spans = steps.split_steps(automaton, tokens, max_step_tokens=limit, eos_ids=[eos])
    shown = [text_of(vocab, tokens[a:b]) for a, b in spans]
    whole = "".join(shown)
    assert text.replace("<eos>", "").replace("<pad>", "").startswith(whole)
    if limit == 1000:
        assert len(spans) == count
        # No step of white space alone but where a delimiter ends it.
        assert all(step.strip() for step in shown)
    assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]
    finished = steps.replay(automaton, tokens, max_step_tokens=limit).steps
    assert finished >= len(spans) - 1


@pytest.mark.parametrize("delimiter", ["\n", "\n\n", " END"])
def test_delimiters_of_white_space(delimiter):
    def texts(text):
        tokens = list(text.encode())
        automaton = table(tuple(SYNTHETIC), delimiter)
        spans = steps.split_steps(automaton, tokens, max_step_tokens=1000)
        return [text[a:b] for a, b in spans]

    d = delimiter
    assert texts(f"a{d}b{d}") == [f"a{d}", f"b{d}"]
    assert texts(f"a{d}b{d} ") == [f"a{d}", f"b{d}"]
    assert texts(f"a{d}{d}b") == [f"a{d}", d, "b"]  # a blank line is an empty step
    assert texts(f"a{d}b{d}{d[:-1]}") == [f"a{d}", f"b{d}"] + ([" EN"] if d == " END" else [])


def test_white_space_is_pythons():
    automaton = table(tuple(SYNTHETIC), THOUGHT)
    for code in [*range(0x3100), 0xFEFF, 0x1F600]:
        tokens = [*b"x</thought>", *chr(code).encode()]
        spans = steps.split_steps(automaton, tokens, max_step_tokens=1000)
        assert len(spans) == (1 if chr(code).isspace() else 2), hex(code)


@pytest.mark.parametrize("tokens", [[700], [-1], [0.5], [[1, 2]]])
def test_tokens_that_are_no_response_are_refused(tokens):
    automaton = table(tuple(SYNTHETIC), "\n")
    with pytest.raises(ValueError, match="tokens: "):
        steps.split_steps(automaton, tokens, max_step_tokens=8)


def test_numpy_and_jit_agree_in_batches():
    rng = np.random.default_rng(0)
    hot = ids(*CRAFTED[:6], b"\n\n\n", b"o", b"ed{\n")
    tokens = rng.choice(hot, size=(40, 3, 8)).astype(np.int32)  # [time, batch...]
    limits = np.array([2, 5, 1000], np.int32)[:, None]  # [3, 1]
    automaton = table(tuple(SYNTHETIC), THOUGHT)

    @jax.jit
    def scanned(automaton, tokens, limits):
        def body(progress, token):
            progress, ended, stopped = steps.advance(
                automaton, progress, token, max_step_tokens=limits
            )
            return progress, (progress, ended, stopped)

        return jax.lax.scan(body, jax.tree.map(jnp.asarray, start(tokens.shape[1:])), tokens)[1]

    traced = jax.device_get(scanned(automaton, tokens, limits))
    progress = start(tokens.shape[1:])
    for t, row in enumerate(tokens):
        progress, ended, stopped = steps.advance(automaton, progress, row, max_step_tokens=limits)
        for host, device in zip([*progress, ended, stopped], jax.tree.leaves(traced), strict=True):
            assert host.dtype == device.dtype
            np.testing.assert_array_equal(host, device[t])
    assert progress.answered.any()
    assert progress.steps[-1].any()  # by delimiters alone

    mapped = jax.vmap(functools.partial(steps.advance, max_step_tokens=5), in_axes=(None, 0, 0))
    some = jax.tree.map(lambda x: x[1], progress)
    on_device = jax.tree.map(jnp.asarray, (automaton, some, tokens[0, 1]))
    host = steps.advance(automaton, some, tokens[0, 1], max_step_tokens=5)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(mapped(*on_device)), host)


def test_the_table_has_its_types_and_padding():
    automaton = table(tuple(SYNTHETIC), THOUGHT)
    states = len(automaton.next_state)
    assert automaton.next_state.shape == automaton.events.shape == (states, 700)
    assert (automaton.next_state.dtype, automaton.events.dtype) == (np.int16, np.uint8)
    for silent in [SYNTHETIC.index(b""), *range(len(SYNTHETIC), 700)]:
        np.testing.assert_array_equal(automaton.next_state[:, silent], np.arange(states))
        assert not automaton.events[:, silent].any()


def test_what_the_vocabulary_cannot_write_is_refused():
    vocab = [b"a", b"b", b"<x", b"y>", b""]
    build = functools.partial(steps.build_automaton, vocab)
    for delimiter in ["\n", "<y", "xa<x>"]:
        with pytest.raises(ValueError, match=r"^delimiter="):
            build(delimiter=delimiter)
    with pytest.raises(ValueError, match=r"^answer_marker='Z'"):
        build(delimiter="a", answer_marker="Z")
    # inside tokens and over their edges it can; a stop string that it can't write does no harm
    for delimiter in ["x", "xy", "ba<", ">a<x"]:
        build(delimiter=delimiter, stop_strings=["never"])


def test_bad_patterns_are_refused():
    build = functools.partial(steps.build_automaton, SYNTHETIC)
    with pytest.raises(ValueError, match="delimiter=''"):
        build(delimiter="")
    with pytest.raises(ValueError, match=r"stop_strings\[1\]=''"):
        build(delimiter="\n", stop_strings=["a", ""])
    with pytest.raises(TypeError, match="stop_strings='stop'"):
        build(delimiter="\n", stop_strings="stop")
    with pytest.raises(ValueError, match="vocab_size=100"):
        build(delimiter="\n", vocab_size=100)
    with pytest.raises(ValueError, match="more than 32768 states"):
        build(delimiter="\n", stop_strings=["z" * 40000])


@repeatable
@given(st.data())
def test_byte_level_bytes_are_the_decoded_text(byte_level, bpe_vocab, data):
    tokens = data.draw(st.lists(st.integers(0, len(byte_level) - 1), max_size=30))
    joined = b"".join(bpe_vocab[token] for token in tokens)
    assert decode(byte_level, tokens) == joined.decode(errors="replace")


def test_special_and_added_tokens(byte_level, bpe_vocab):
    tokens = byte_level.convert_tokens_to_ids(["<eos>", "<tool_call>", "a\nb"])
    assert [bpe_vocab[token] for token in tokens] == [b"", b"<tool_call>", b"a\nb"]
    assert len(bpe_vocab) == len(byte_level) == 602
    assert {bytes([byte]) for byte in range(256)} < set(bpe_vocab)


def test_what_becomes_special_later_has_no_bytes():
    tokenizer = fast(models.WordLevel({"a": 0, "b": 1}), decoder=decoders.Fuse())
    assert token_bytes(tokenizer) == [b"a", b"b"]
    tokenizer.eos_token = "b"
    assert token_bytes(tokenizer) == [b"a", b""]


def with_tags(byte_level, *tags):
    """The byte-level tokenizer with special tokens for these texts."""
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.add_tokens(list(tags), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


@pytest.mark.parametrize(
    ("delimiter", "text"),
    [
        (THOUGHT, "one</thought>two</thought>\n<eos>"),
        (THOUGHT, "one</thought>\ntwo"),
        (THOUGHT, "one</thought>two<eos><|pad|>"),
        ("</thought>\n", "one</thought>\ntwo</thought></thought>\n<eos>"),  # special, then text
        ("\n</thought>", "one</thought>\n</thought>two\n</thought><eos>"),
        ("<end></thought>", "one<end></thought>two</thought><end></thought><eos>"),  # two of them
    ],
)
def test_a_delimiter_that_is_a_special_token_is_found_by_its_id(byte_level, delimiter, text):
    tokenizer = with_tags(byte_level, THOUGHT, "<end>")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids(THOUGHT) in tokens
    vocab = token_bytes(tokenizer)
    automaton = steps.build_automaton(vocab, delimiter=delimiter)
    eos = [tokenizer.eos_token_id]
    spans = steps.split_steps(automaton, tokens, max_step_tokens=99, eos_ids=eos)
    shown = text.replace("<eos>", "").replace("<|pad|>", "").rstrip()
    assert len(spans) == 2
    assert "".join(text_of(vocab, tokens[a:b]) for a, b in spans).rstrip() == shown
    assert text_of(vocab, tokens[slice(*spans[0])]).endswith(delimiter)


def test_markers_and_stop_strings_that_are_special_tokens_are_found_by_their_ids(byte_level):
    tokenizer = with_tags(byte_level, "<answer>", "<|im_end|>")
    stops = ["<|im_end|>", "<|pad|>", "x<eos>"]  # a stop string may be a token that is no text
    vocab = token_bytes(tokenizer, stop_strings=stops)
    automaton = steps.build_automaton(
        vocab, delimiter="\n", answer_marker="<answer>", stop_strings=stops
    )
    tokens = tokenizer.encode("a<answer>b<|im_end|>c<eos>d<|pad|>x<eos>", add_special_tokens=False)
    rows, _ = walk(automaton, tokens, 99)
    text = [tokenizer.convert_ids_to_tokens(token) for token in tokens]
    assert text[[row[3] for row in rows].index(True)] == "<answer>"
    assert [t for t, row in zip(text, rows, strict=True) if row[4]] == [
        "<|im_end|>",
        "<|pad|>",
        "<eos>",
    ]
    assert rows[-1][4]
    assert token_bytes(tokenizer)[tokenizer.pad_token_id] == b""


def test_byte_level_entries_that_spell_no_bytes_are_their_own_text():
    entries = {"Ġa": 0, "數": 1, "é數": 2}  # as the decoder does: all of the entry or none
    tokenizer = fast(models.WordLevel(entries), decoder=decoders.ByteLevel())
    vocab = token_bytes(tokenizer)
    assert vocab == [b" a", "數".encode(), "é數".encode()]
    assert decode(tokenizer, [1, 0, 2]) == (vocab[1] + vocab[0] + vocab[2]).decode()


def test_byte_level_is_seen_in_nested_sequences_and_without_a_decoder(byte_level, bpe_vocab):
    model, before = byte_level.backend_tokenizer.model, byte_level.backend_tokenizer.pre_tokenizer
    nested = decoders.Sequence([decoders.Sequence([decoders.ByteLevel()]), decoders.Fuse()])
    plain = bpe_vocab[:600]
    for decoder in (nested, None):
        tokenizer = fast(model, pre_tokenizer=before, decoder=decoder, eos_token="<eos>")
        assert token_bytes(tokenizer) == plain


METASPACE = {"<unk>": b"", "▁the": b" the", "▁": b" ", "▁▁": b"  ", "end": b"end"}
FALLBACK = {"<0x0A>": b"\n", "<0xC3>": b"\xc3", "<0xA9>": b"\xa9", "<0xG0>": b"<0xG0>"}


def test_replaced_spaces_and_byte_fallback():
    entries = {**METASPACE, **FALLBACK}
    ids_of = {token: id_ for id_, token in enumerate(entries)}
    as_llama = [decoders.Replace("▁", " "), decoders.ByteFallback()]
    as_llama += [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer = fast(
        models.BPE(ids_of, [], unk_token="<unk>", byte_fallback=True),
        decoder=decoders.Sequence(as_llama),
        added=["\n\n", "▁x"],
        unk_token="<unk>",
    )
    vocab = token_bytes(tokenizer)
    assert vocab == [*entries.values(), b"\n\n", "▁x".encode()]
    spelled = ["end", "▁the", "<0x0A>", "<0xC3>", "<0xA9>", "▁▁", "\n\n", "<unk>", "<0xG0>", "▁"]
    tokens = tokenizer.convert_tokens_to_ids(spelled)
    assert decode(tokenizer, tokens) == b"".join(vocab[token] for token in tokens).decode()


@pytest.mark.parametrize(
    "component",
    [{"decoder": decoders.Metaspace()}, {"pre_tokenizer": pre_tokenizers.Metaspace()}],
    ids=lambda component: next(iter(component)),
)
def test_metaspace(component):
    model = models.Unigram([(token, -1.0) for token in METASPACE], unk_id=0)
    tokenizer = fast(model, unk_token="<unk>", **component)
    assert token_bytes(tokenizer) == list(METASPACE.values())


def test_character_tokenizer_with_gaps_in_its_ids():
    chars = {char: 2 * i + 1 for i, char in enumerate("0123456789+=\n é\\boxed{}Ġ")}
    chars |= {"<pad>": 60, "<unk>": 61}
    tokenizer = fast(
        models.WordLevel(chars, unk_token="<unk>"),
        pre_tokenizer=pre_tokenizers.Split("", "isolated"),
        decoder=decoders.Fuse(),
        pad_token="<pad>",
        unk_token="<unk>",
    )
    vocab = token_bytes(tokenizer)
    assert len(vocab) == 62
    assert vocab[60] == vocab[61] == vocab[0] == b""
    text = "1+2=3\n3+é=Ġ\n\\boxed{3}\n"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(vocab[i] for i in tokens).decode() == text == decode(tokenizer, tokens)

    automaton = steps.build_automaton(vocab, delimiter="\n", answer_marker=BOXED)
    spans = steps.split_steps(automaton, [*tokens, 60], max_step_tokens=256, eos_ids=[60])
    assert [decode(tokenizer, tokens[a:b]) for a, b in spans] == text.splitlines(keepends=True)
    assert steps.replay(automaton, tokens, max_step_tokens=256).answered


def test_tokenizers_whose_tokens_have_no_bytes_of_their_own_are_refused():
    with pytest.raises(TypeError, match="ByT5Tokenizer is slow"):
        token_bytes(transformers.ByT5Tokenizer())
    word_piece = models.WordPiece({"[UNK]": 0, "step": 1, "##s": 2}, unk_token="[UNK]")
    with pytest.raises(TypeError, match="WordPiece"):
        token_bytes(fast(word_piece, decoder=decoders.WordPiece()))
    stripping = decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()])
    with pytest.raises(TypeError, match="Strip"):
        token_bytes(fast(models.WordLevel({"a": 0}, unk_token="a"), decoder=stripping))
