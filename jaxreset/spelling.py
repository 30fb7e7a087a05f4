"""The bytes that each token of a tokenizer writes, and which tokens are no text.

A token's text alone may be half a character, so what the policy writes is known only in bytes. They
come from the vocabulary and the decoder of the backend, and not from decoding tokens one by one,
which drops spaces and replaces what isn't UTF-8. The module needs nothing but the tokenizer that it
is given.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

# What a tokenizer calls the tokens that are no text.
_ROLES = ("bos", "eos", "pad", "unk")


def silent_ids(tokenizer: Any) -> set[int]:
    """The tokens that are no text: those that begin, end or pad one, or stand for what can't be spelt.

    The tokenizer names them (`bos_token`, `eos_token`, `pad_token`, `unk_token`). Other special tokens,
    such as a `</thought>` that was added as one, are text that the policy writes.
    """
    ids = (getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES)
    return {id_ for id_ in ids if id_ is not None}


def token_bytes(tokenizer: Any, *, stop_strings: Sequence[str] = ()) -> list[bytes]:
    """The bytes that each token writes, by id, for a fast Hugging Face tokenizer.

    The backend's decoder says how the vocabulary spells bytes: byte-level BPE (each byte is a
    printable character, as in GPT-2), Metaspace and byte fallback (`▁` for a space, `<0x0A>` for a
    byte), or plain text; where there is no decoder, the pre-tokenizer does. Added tokens, special
    ones too, stand for their own text, but for `silent_ids`. What a decoder does to the text as a
    whole, such as dropping its first space, belongs to no token and is left out.

    Args:
      tokenizer: a tokenizer of `transformers`, 4 or 5, that the `tokenizers` library backs.
      stop_strings: what ends a response may be silent in its text: such tokens in one of these
        have bytes.

    Returns:
      A list over all ids, of at least len(tokenizer); silent tokens and unused ids are b"".

    Raises:
      TypeError: a slow tokenizer, or a decoder that makes a token's text depend on its neighbours
        (WordPiece, for one).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(
            f"tokenizer: {type(tokenizer).__name__} is slow (no `backend_tokenizer`); expected a "
            "fast one, as transformers.AutoTokenizer gives for a folder with a tokenizer.json"
        )
    spell = _speller(backend)
    added = backend.get_added_tokens_decoder()
    silent = silent_ids(tokenizer)
    ids = backend.get_vocab(with_added_tokens=True)
    out = [b""] * max(len(tokenizer), max(ids.values(), default=-1) + 1)
    for token, id_ in ids.items():
        if id_ not in silent or any(token in stop for stop in stop_strings):
            out[id_] = token.encode() if id_ in added else spell(token)
    return out


def _speller(backend: Any) -> Callable[[str], bytes]:
    """The bytes of one vocabulary entry, as this backend spells them."""
    parts = _parts(backend.decoder, "decoders")
    if not parts:
        before = _parts(backend.pre_tokenizer, "pretokenizers")
        parts = [part for part in before if part["type"] in ("ByteLevel", "Metaspace")]
    byte_level = byte_fallback = fused = False
    replacements: list[tuple[str, str]] = []
    for part in parts:
        kind = part["type"]
        if kind == "ByteLevel":
            byte_level = True
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "Metaspace":
            replacements.append((part["replacement"], " "))
        elif kind == "Replace" and "String" in part["pattern"]:
            replacements.append((part["pattern"]["String"], part["content"]))
        elif kind == "Fuse":
            fused = True
        elif not (kind == "Strip" and fused):  # after Fuse it strips the text, not each token
            raise TypeError(
                f"tokenizer: its decoder has the part {part}, so a token alone doesn't tell its "
                "bytes; expected ByteLevel, Metaspace, Replace, ByteFallback, Fuse, then Strip"
            )

    def spell(token: str) -> bytes:
        if byte_fallback and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        if byte_level and all(char in _BYTE_OF_CHAR for char in token):
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return spell


def _parts(component: Any, key: str) -> list[dict[str, Any]]:
    """A `tokenizers` component's parts as JSON objects, nested sequences laid flat."""

    def flat(part: dict[str, Any]) -> list[dict[str, Any]]:
        if part["type"] != "Sequence":
            return [part]
        return [leaf for child in part[key] for leaf in flat(child)]

    return [] if component is None else flat(json.loads(component.__getstate__()))


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable characters for bytes: Latin-1's own where visible, the others from 256."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_of_char()
