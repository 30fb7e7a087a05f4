"""How prompts begin and end, whatever the tokenizer and its chat template, and what day it is in them."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path

import numpy as np
import pytest
from scripted import PROBLEMS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from jaxreset.config_file import load_config
from jaxreset.errors import ConfigError
from jaxreset.models.encoding import (
    chat_variables,
    continuation_tokens,
    fill_chat,
    prompt_tokens,
    question_tokens,
)
from jaxreset.resets.localize import PolicyLocalizer, ScoringLocalizer
from jaxreset.resets.rules import Failure
from jaxreset.run import folder as run_folder
from jaxreset.run.folder import RunFolder
from jaxreset.run.lessons import make_lessons
from jaxreset.tasks.asking import Asking
from jaxreset.tasks.chain import ChainTask
from jaxreset.tasks.pipeline import PromptSource, encode_prompts, fit_prompts

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
TASK = ChainTask()
TURN = "{% for m in messages %}{{ m.content }}{% endfor %}"
CHATS = {
    "none": None,
    "plain": TURN,
    "with BOS": "{{ bos_token }}" + TURN,
    "with both": "{{ bos_token }}" + TURN + "{{ eos_token }}",
    "twice": "{{ bos_token }}{{ bos_token }}" + TURN + "{{ eos_token }}{{ eos_token }}",
}
ADDED = {"nothing": "$A", "BOS": "<s> $A", "EOS": "$A </s>", "both": "<s> $A </s>"}


def characters(added="$A", chat=None, **special):
    """Of single characters; `added`: what it puts around a text."""
    texts = ["<pad>", "<s>", "</s>", "<x>", *map(chr, range(32, 127)), "\n"]
    core = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single=added, special_tokens=[("<s>", 1), ("</s>", 2), ("<x>", 3)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = chat
    return tokenizer


def spelt(tokenizer, tokens):
    return "".join(tokenizer.convert_ids_to_tokens([int(token) for token in tokens]))


def questions(tokenizer):
    """Everything that a policy is asked to continue."""
    failure = Failure(TASK, PROBLEMS[0], ["a3=3", "b8=2"], (0, 0, 0, 0, 0))
    options = {"batch": 1, "question_limit": 99, "temperature": 0.3, "top_p": 1.0}
    asking = Asking(TASK, tokenizer)
    stream = PromptSource(PROBLEMS, asking, seed=0)
    solving = [*encode_prompts(PROBLEMS, asking, range(3)), *stream.next(2)]
    yield from ((p.tokens, TASK.prompt(p.problem)) for p in solving)
    asked = TASK.localization(failure.problem, failure.steps)
    yield PolicyLocalizer(None, asking, **options)._encode(failure.problem, failure.steps), asked
    scoring = ScoringLocalizer(asking, most_steps=2, **options)
    yield scoring._encode(failure.problem, failure.steps), asked


@pytest.mark.parametrize(("added", "chat"), list(itertools.product(ADDED, CHATS)))
def test_prompts_have_one_beginning_and_no_end(added, chat):
    tokenizer = characters(ADDED[added], CHATS[chat])
    for tokens, text in questions(tokenizer):
        assert tokens.dtype == np.int32
        chatted = "BOS" in chat + "BOS" * (chat in ("with both", "twice"))
        begun = "<s>" if added in ("BOS", "both") or chatted else ""
        assert spelt(tokenizer, tokens) == begun + text
    asking = Asking(TASK, tokenizer)
    inline = PolicyLocalizer(
        None,
        Asking(TASK, tokenizer, chat="raw"),
        batch=1,
        question_limit=9,
        inline=True,
        temperature=0,
        top_p=1,
    )._encode(PROBLEMS[0], ["a3=3"])
    assert spelt(tokenizer, inline) == "?\n"  # it stands in the middle
    answers = ScoringLocalizer(
        Asking(TASK, tokenizer), most_steps=2, batch=1, question_limit=9, temperature=0
    )
    assert [spelt(tokenizer, row) for row in answers._weigher._answers] == [
        "\\boxed{1}",
        "\\boxed{2}",
    ]

    lessons = make_lessons(load_config(QUICKSTART, ["warm_start.steps=2"]), asking, PROBLEMS, (2,))
    for shown in (one for step in range(2) for batch in lessons.of_step(step) for one in batch):
        text = spelt(tokenizer, [*shown.prompt, *shown.answer])
        assert text.count("<s>") == text.startswith("<s>") == bool(begun)
        assert text.count("</s>") == text.endswith("</s>") == 1
        assert shown.prompt.dtype == shown.answer.dtype == np.int32


def test_texts_that_begin_or_end_like_a_sequence():
    for added, text, want in (
        ("$A", "<s>ab", "<s>ab"),
        ("$A", "<s><s>ab</s>", "<s>ab"),
        ("<s> $A </s>", "<s>ab</s></s>", "<s>ab"),
        ("<s> $A </s>", "ab", "<s>ab"),
        ("<x> <s> $A <x>", "<s>ab", "<x><s>ab"),  # a prefix of its own stays, what is behind goes
        ("<x> $A", "ab", "<x>ab"),
        ("<x> $A", "<s>ab", "<x><s>ab"),
        ("<s> $A", "a<s>b</s>c", "<s>a<s>b</s>c"),  # the text's own business
        ("<s> $A", "", "<s>"),
    ):
        tokenizer = characters(added)
        assert spelt(tokenizer, prompt_tokens(tokenizer, [text])[0]) == want
        bare = want.removeprefix("<x>").removeprefix("<s>")
        assert spelt(tokenizer, continuation_tokens(tokenizer, text)) == bare
    without = characters(bos_token=None)
    assert spelt(without, prompt_tokens(without, ["<s>ab"])[0]) == "<s>ab"
    assert prompt_tokens(without, []) == []
    both = characters("<s> $A </s>")
    assert [spelt(both, tokens) for tokens in prompt_tokens(both, ["", "ab"])] == ["<s>", "<s>ab"]
    one = characters("<s> $A", eos_token="<s>", bos_token="<s>")  # as GPT-2's
    assert spelt(one, prompt_tokens(one, ["ab<s>"])[0]) == "<s>ab"


def test_the_longest_prompt_is_measured_as_it_is_asked():
    asking = Asking(TASK, characters("<s> $A </s>"))
    longest = max(len(p.tokens) for p in encode_prompts(PROBLEMS, asking, range(3)))
    kept, found = fit_prompts(list(PROBLEMS), asking, longest, refuse=True)
    assert (len(kept), found.longest) == (3, longest)
    with pytest.raises(ValueError, match=f"max_prompt_tokens={longest - 1}"):
        fit_prompts(list(PROBLEMS), asking, longest - 1, refuse=True)


LLAMA = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
    "    {%- else %}\n"
    '        {%- set date_string = "26 Jul 2024" %}\n'
    "    {%- endif %}\n"
    "{%- endif %}\n"
    '{{- "Today Date: " + date_string + "\\n\\n" }}' + TURN
)
DAYS = {
    LLAMA: "<s>Today Date: 09 Feb 2025\n\nhi",
    "{{ date_string }}": "09 Feb 2025",
    "\n\n{{ strftime_now('%Y-%m-%d') }}" + TURN: "\n\n2025-02-09hi",
    "{% macro day() %}{{ strftime_now('%A, %-d. %B %Y, %H:%M, 100%%d') }}{% endmacro %}"
    "{% for m in messages %}{{ day() ~ m.content }}{% endfor %}": (
        "Sunday, 9. February 2025, 00:00, 100%dhi"
    ),
}


@pytest.mark.parametrize("template", DAYS, ids=range(len(DAYS)))
def test_a_chat_template_is_told_the_day(template, monkeypatch):
    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 12, 30, 13, 14)

    tokenizer = characters(chat=template)
    variables = chat_variables(datetime.date(2025, 2, 9))
    messages = [{"role": "user", "content": "hi"}]
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert fill_chat(tokenizer, messages, variables) == DAYS[template]
    if "strftime_now" in template:  # not pinned, it is another
        chat_template_utils._compile_jinja_template.cache_clear()
        assert "31" in fill_chat(tokenizer, messages, {}) or "30" in fill_chat(
            tokenizer, messages, {}
        )
    asked = question_tokens(tokenizer, "hi", variables)
    assert spelt(tokenizer, asked) == DAYS[template]


def test_the_thinking_switch_reaches_the_template():
    tokenizer = characters(chat="{{ enable_thinking is defined }}{{ enable_thinking }}")
    for switch, shown in ((None, "False"), (True, "TrueTrue"), (False, "TrueFalse")):
        variables = chat_variables(enable_thinking=switch)
        assert spelt(tokenizer, question_tokens(tokenizer, "hi", variables)) == shown


def test_a_run_keeps_the_day_on_which_it_started(tmp_path, monkeypatch):
    def today(day):
        class Calendar(datetime.date):
            @classmethod
            def today(cls):
                return cls(2025, 2, day)

        monkeypatch.setattr(run_folder.datetime, "date", Calendar)

    def opened(*overrides):
        folder = RunFolder(load_config(QUICKSTART, [f"run.dir={tmp_path}", *overrides]))
        folder.check_writable()
        return folder, folder.dated()

    today(9)
    folder, config = opened()
    assert str(config.task.date) == "2025-02-09"
    folder.claim()
    today(10)
    assert str(opened()[1].task.date) == "2025-02-10"  # nothing has been drawn yet
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    folder, config = opened()
    assert str(config.task.date) == "2025-02-09"
    assert str(folder.config.task.date) == "2025-02-09"
    folder.claim()
    assert load_config(folder.saved).task == config.task
    assert str(opened("task.date=2025-02-09")[1].task.date) == "2025-02-09"
    with pytest.raises(ConfigError, match=r"task\.date: '2025-02-09' there, '2025-02-10' asked"):
        opened("task.date=2025-02-10")
    with pytest.raises(ConfigError, match=r"task\.enable_thinking: None there, False asked"):
        opened("task.enable_thinking=false")

    # A run of a version that kept no day goes on, and keeps one from then on.
    text = folder.saved.read_text()
    folder.saved.write_text(text.replace("  date: '2025-02-09'\n", ""))
    folder, config = opened()
    assert str(config.task.date) == "2025-02-10"
    folder.claim()
    today(11)
    assert str(opened()[1].task.date) == "2025-02-10"
