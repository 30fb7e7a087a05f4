"""From texts to token ids: how a prompt begins and ends, and how a chat template is filled in.

A prompt is to be continued, so it never ends with an end-of-sequence token; where the tokenizer uses
a beginning-of-sequence token, it begins with exactly one. Tokenizers and chat templates differ in
which of the two they add, so neither is relied upon.

Text that spells a special token becomes that token, wherever it comes from: a template file may hold
turns of a chat, and a problem that quotes `<|im_end|>` says just that.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# What `strftime` knows everywhere, and what templates use besides: days and months without a zero.
DIRECTIVES = (*"aAbBcdfGHIjmMpSuUVwWxXyYzZ", "-d", "-m")


def prompt_tokens(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids `[t]` int32 of each prompt, raw text or a filled chat template.

    Tokens that the tokenizer puts before a text stay, those that it puts behind are left out. One
    beginning-of-sequence token stands in front where the tokenizer puts it there or the text begins
    with it, and end-of-sequence tokens at the end of the text are dropped.

    Args:
      tokenizer: a Hugging Face tokenizer.
      texts: any number of prompts.
    """
    if not texts:
        return []
    plain = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    shown = next((n for n, ids in enumerate(plain) if ids), 0)
    before = _put_before(plain[shown], tokenizer.encode(texts[shown]), bos)
    prompts = []
    for ids in plain:
        body = _bare(tokenizer, ids)
        given = bos is not None and ids[:1] == [bos] and bos not in before
        prompts.append(np.asarray([*before, *[bos] * given, *body], np.int32))
    return prompts


def continuation_tokens(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids `[t]` int32 of text that goes on from other tokens: nothing in front, nothing behind."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(_bare(tokenizer, ids), np.int32)


def question_tokens(
    tokenizer: Any, question: str, variables: Mapping[str, Any] | None = None
) -> np.ndarray:
    """Token ids `[t]` of a question: in the chat template where the tokenizer has one, else raw text.

    `variables` are what the template is told besides, see `chat_variables`.
    """
    if getattr(tokenizer, "chat_template", None):
        question = fill_chat(tokenizer, [{"role": "user", "content": question}], variables or {})
    return prompt_tokens(tokenizer, [question])[0]


def _put_before(plain: list[int], whole: list[int], bos: int | None) -> list[int]:
    """What a tokenizer puts before a text: `whole` is `plain` with tokens of its own around."""
    if not plain:  # which stand before and which behind, nothing else tells
        return [bos] if bos is not None and whole[:1] == [bos] else []
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _bare(tokenizer: Any, ids: list[int]) -> list[int]:
    """Without beginnings of a sequence in front and ends of one behind."""
    start, stop = 0, len(ids)
    while start < stop and ids[start] == tokenizer.bos_token_id:
        start += 1
    while stop > start and ids[stop - 1] == tokenizer.eos_token_id:
        stop -= 1
    return ids[start:stop]


def chat_variables(
    date: datetime.date | None = None, enable_thinking: bool | None = None
) -> dict[str, Any]:
    """What `fill_chat` tells a chat template besides the messages.

    Args:
      date: what the template takes for today.
      enable_thinking: the switch of templates that have one; None: left to the template.
    """
    given = {"date": date, "enable_thinking": enable_thinking}
    return {name: value for name, value in given.items() if value is not None}


def fill_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    variables: Mapping[str, Any],
    *,
    answered: bool = False,
) -> str:
    """The tokenizer's chat template with these messages, up to where the policy's turn begins.

    Args:
      tokenizer: one with a chat template.
      messages: with `role` and `content`.
      variables: as `chat_variables` gives them. With a `date`, the template's `date_string` and
        `strftime_now` say that day, at midnight, whatever day it is.
      answered: the last message is the policy's, and the text goes up to where its turn ends.
    """
    given, template = dict(variables), tokenizer.get_chat_template()
    date = given.pop("date", None)
    if date is not None:
        given["date_string"] = date.strftime("%d %b %Y")
        if "strftime_now" in template:
            template = _clock(date) + template
    return str(
        tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=not answered,
            **given,
        )
    )


def _clock(date: datetime.date) -> str:
    """Template source that puts a clock that stands still in the place of `strftime_now`.

    transformers hands no functions to a template, so it is written in the template's own language.
    """
    midnight = datetime.datetime.combine(date, datetime.time())
    replaced = "".join(
        f"|replace({json.dumps(f'%{name}')}, {json.dumps(midnight.strftime(f'%{name}'))})"
        for name in DIRECTIVES
    )
    parts = '{%- for part in format.split("%%") %}{{ "%" if not loop.first }}{{ part' + replaced
    # The empty text at the end keeps a line break that the template begins with.
    return "{%- macro strftime_now(format) %}" + parts + ' }}{% endfor %}{%- endmacro %}{{ "" }}'
