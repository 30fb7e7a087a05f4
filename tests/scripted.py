"""A sampler and a localizer without a model: each test writes down what every row draws.

Both refuse to draw one random number twice, and what lies behind a row's end is poison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer

from jaxreset.groups import Group
from jaxreset.resets.collect import Collected, Collector
from jaxreset.resets.rules import Failure
from jaxreset.sampling.rounds import Round, Shape, Snapshot, StopReason, Stream
from jaxreset.spelling import token_bytes
from jaxreset.steps import build_automaton, split_steps
from jaxreset.tasks.base import Problem
from jaxreset.tasks.chain import TOKENIZER, ChainTask
from jaxreset.tasks.pipeline import Prompt

TASK = ChainTask()
CHAIN_TOKENIZER = AutoTokenizer.from_pretrained(TOKENIZER)
AUTOMATON = build_automaton(
    token_bytes(CHAIN_TOKENIZER), delimiter=TASK.delimiter, answer_marker=TASK.answer_marker
)
POLICY: Any = SimpleNamespace(version=0, tokenizer=CHAIN_TOKENIZER)
EOS = "<eos>"
POISON = CHAIN_TOKENIZER.convert_tokens_to_ids("?")

PROBLEMS = (
    Problem("p0", "a3b8c5", "6"),
    Problem("p1", "a9b9c9d9", "6"),
    Problem("p2", "a1b2", "3"),
)


def decode(tokens: np.ndarray) -> str:
    return CHAIN_TOKENIZER.decode(tokens, skip_special_tokens=True)


def encode(text: str) -> np.ndarray:
    return np.asarray(CHAIN_TOKENIZER.encode(text), np.int32)


def prompts(*indexes: int) -> list[Prompt]:
    """Prompts with these global indexes; number i asks problem i modulo their number."""
    problems = [PROBLEMS[i % len(PROBLEMS)] for i in indexes]
    return [Prompt(p, encode(TASK.prompt(p)), i) for i, p in zip(indexes, problems, strict=True)]


def written(problem: Problem, outcome: str, kept: str = "") -> str:
    r"""What a row draws after the lines `kept`, for one letter of a script.

    S: the solution. 1-9: a solution whose sum is off from that step on. T: the solution's sums
    without the answer, ended by EOS. C: the same, cut in the middle of the last sum. 0: EOS and no
    step.
    """
    lines = TASK.solution(problem)
    if outcome == "0":
        return EOS
    if outcome.isdigit():
        lines = planted(problem, int(outcome), 1)
    elif outcome in "TC":
        lines = lines[:-1]
    text = "".join(f"{line}\n" for line in lines[kept.count("\n") :])
    return {"T": text + EOS, "C": text[:-2] or EOS}.get(outcome, text)


def planted(problem: Problem, step: int, offset: int) -> list[str]:
    """The solution with each sum from `step` on, and the answer, off by `offset`."""
    lines = TASK.solution(problem)
    for i in range(step - 1, len(lines)):
        value = (int(lines[i].rstrip("}")[-1]) + offset) % 10
        lines[i] = f"\\boxed{{{value}}}" if i == len(lines) - 1 else f"{lines[i][:-1]}{value}"
    return lines


class Call(NamedTuple):
    """A call of a scripted sampler."""

    verb: str
    stream: Stream
    ids: list[int]
    first_rows: list[int]
    rows: int
    snapshots: list[Snapshot]
    options: dict[str, Any]
    drawn: Round


Script = Mapping[int, Mapping[int, str]] | Callable[[int, int, int, str], str]


class ScriptedRounds:
    """`collect.Rounds` by script: prompt index -> phase -> a letter a row, see `written`.

    A callable script gets (prompt index, phase, row, kept text) and returns the text to draw.
    """

    def __init__(self, script: Script):
        self.script = script
        self.calls: list[Call] = []
        self._seen: set[tuple[Any, ...]] = set()

    def sample(
        self,
        policy: Any,
        prompts: Sequence[np.ndarray],
        *,
        rows: int,
        stream: Stream,
        ids: Sequence[int],
        first_rows: Sequence[int],
        **options: Any,
    ) -> Round:
        kept = options.get("kept", [0] * len(prompts))
        lengths = [len(p) - k for p, k in zip(prompts, kept, strict=True)]
        drawn = self._draw(policy, list(prompts), lengths, rows, stream, ids, first_rows)
        call = Call("sample", stream, list(ids), list(first_rows), rows, [], options, drawn)
        self.calls.append(call)
        return drawn

    def resume(
        self,
        policy: Any,
        snapshots: Sequence[Snapshot],
        *,
        rows: int,
        stream: Stream,
        first_rows: Sequence[int],
        **options: Any,
    ) -> Round:
        parent = snapshots[0].round
        assert all(s.round is parent for s in snapshots), "snapshots of several rounds"
        assert any(call.drawn is parent for call in self.calls), "a round that isn't ours"
        for s in snapshots:
            response = parent.response(s.group, s.row)
            assert 0 <= s.length - parent.prompt_lengths[s.group] <= len(response)
        ids = [int(parent.ids[s.group]) for s in snapshots]
        lengths = [int(parent.prompt_lengths[s.group]) for s in snapshots]
        prefixes = [s.tokens for s in snapshots]
        drawn = self._draw(policy, prefixes, lengths, rows, stream, ids, first_rows)
        call = Call("resume", stream, ids, list(first_rows), rows, list(snapshots), options, drawn)
        self.calls.append(call)
        return drawn

    def steps(self, response: np.ndarray) -> list[tuple[int, int]]:
        eos = [CHAIN_TOKENIZER.eos_token_id]
        return split_steps(AUTOMATON, response, max_step_tokens=16, eos_ids=eos)

    @property
    def tokens(self) -> int:
        """Tokens drawn so far."""
        return sum(int(call.drawn.lengths.sum()) for call in self.calls)

    def _draw(
        self,
        policy: Any,
        prefixes: list[np.ndarray],
        prompt_lengths: Sequence[int],
        rows: int,
        stream: Stream,
        ids: Sequence[int],
        first_rows: Sequence[int],
    ) -> Round:
        shape = len(prefixes), rows
        drawn = np.empty(shape, object)
        for g, r in np.ndindex(shape):
            name = (*stream, ids[g], first_rows[g] + r)
            assert name not in self._seen, f"(seed, step, phase, prompt, row) {name} drawn twice"
            self._seen.add(name)
            kept = decode(prefixes[g][prompt_lengths[g] :])
            drawn[g, r] = encode(self._text(ids[g], stream.phase, first_rows[g] + r, kept))
        lengths = np.vectorize(len, otypes=[int])(drawn)
        tokens = np.full((*shape, lengths.max() + 2), POISON, np.int32)
        logps = np.full(tokens.shape, np.nan, np.float32)
        reasons = np.zeros(shape, int)
        for (g, r), row in np.ndenumerate(drawn):
            tokens[g, r, : len(row)] = row
            logps[g, r, : len(row)] = -0.01 * (row + np.arange(len(row)) + 1)
            ended, text = row[-1] == CHAIN_TOKENIZER.eos_token_id, decode(row)
            answer = StopReason.ANSWER if TASK.answer_marker in text else StopReason.LENGTH
            reasons[g, r] = StopReason.EOS if ended else answer
        return Round(
            ids=np.asarray(ids),
            prefixes=prefixes,
            prompt_lengths=np.asarray(prompt_lengths),
            tokens=tokens,
            lengths=lengths,
            behavior_logps=logps,
            sampling_logps=logps,
            reasons=reasons,
            version=policy.version,
            shape=Shape(*shape, 0, tokens.shape[-1]),
            lane_steps=int(lengths.max()) * lengths.size,
            prefix_reads=int(lengths.max()) * len(lengths),
            held=(),
        )

    def _text(self, prompt: int, phase: int, row: int, kept: str) -> str:
        if callable(self.script):
            return self.script(prompt, phase, row, kept)
        return written(PROBLEMS[prompt % len(PROBLEMS)], self.script[prompt][phase][row], kept)


class Question(NamedTuple):
    """A question that a scripted localizer was asked."""

    prompt: int
    phase: int
    row: int
    text: str


class ScriptedLocalizer:
    """`collect.Localizer` by script: (prompt index, phase, row) -> answer, or one for all."""

    def __init__(self, answers: Mapping[tuple[int, int, int], str] | str, tokens_each: int = 7):
        self.answers = answers
        self.tokens_each = tokens_each
        self.questions: list[Question] = []
        self.calls = 0

    def __call__(
        self, policy: Any, failures: Sequence[Failure], ends: Sequence[Snapshot]
    ) -> tuple[list[str], int]:
        asked = []
        for failure, end in zip(failures, ends, strict=True):
            _, _, phase, prompt, row = failure.seed
            text = failure.task.localization(failure.problem, failure.steps)
            asked.append(Question(prompt, phase, row, text))
            # The question may go on from there.
            assert CHAIN_TOKENIZER.eos_token_id not in end.tokens
            assert decode(end.tokens).rstrip("\n").endswith(failure.steps[-1])
        names = [(q.prompt, q.phase, q.row) for q in (*self.questions, *asked)]
        assert len(set(names)) == len(names), "two questions with the same random numbers"
        self.questions += asked
        self.calls += 1
        scripted = self.answers
        if isinstance(scripted, str):
            return [scripted] * len(asked), self.tokens_each * len(asked)
        answers = [scripted[q.prompt, q.phase, q.row] for q in asked]
        return answers, self.tokens_each * len(asked)

    @property
    def tokens(self) -> int:
        """Tokens spent so far."""
        return self.tokens_each * len(self.questions)


DRAW = {"temperature": 0.7, "top_p": 0.95, "top_k": 0}


class Run(NamedTuple):
    """A collected step, and what was asked of the sampler and the localizer."""

    out: Collected
    rounds: ScriptedRounds
    localizer: ScriptedLocalizer

    @property
    def groups(self) -> list[Group]:
        return self.out.groups

    @property
    def tree(self) -> dict[str, Any]:
        (tree,) = self.out.trees
        return tree

    @property
    def resets(self) -> list[Group]:
        return [g for g in self.groups if g.reset_step is not None]

    @property
    def drawn(self) -> list[tuple[str, int, list[int]]]:
        """(verb, phase, first row of each group) of each call of the sampler."""
        return [(c.verb, c.stream.phase, c.first_rows) for c in self.rounds.calls]


def collect(objective, script, answers="\\boxed{2}", *, batch=None, seed=3, step=5) -> Run:
    """Collects for the script's prompts, or `batch`; a script of phases alone is for prompt 0."""
    if not callable(script) and all(isinstance(rows, str) for rows in script.values()):
        script = {0: script}
    rounds, localizer = ScriptedRounds(script), ScriptedLocalizer(answers)
    to = Collector(objective, rounds, TASK, decode, localizer, DRAW)
    return Run(
        to.collect(POLICY, batch or prompts(*script), seed=seed, step=step), rounds, localizer
    )
