"""Alarms: what would train for days on nothing is said once a run, loudly, with its likely cause.

All that an alarm depends on is in the metrics so far, so a run that goes on sounds the same ones.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxreset.config import Config
from jaxreset.json_text import dumps, loads
from jaxreset.parallel.processes import is_leader
from jaxreset.tasks.base import Task

logger = logging.getLogger(__name__)

Record = dict[str, Any]

# Training steps in a row after which an alarm sounds; no reward: one, after an evaluation without any.
STEPS = {
    "no reward": 3,
    "cut": 3,
    "unanswered": 3,
    "one step": 3,
    "no step named": 5,
    "no signal": 10,
}
NEARLY_ALL = 0.95
ONE_STEP = 1.05  # or fewer, on average, are hardly worth a reset
SHOWN_CHARACTERS = 600  # of a response


class Alarm(NamedTuple):
    """What is wrong.

    Attributes:
      kind: a key of `STEPS`, "no end", or "nothing solved" of an evaluation.
      step: after which it was noticed.
      text: with the likely cause, and what to change.
      response: one of that step, shortened; None where none was drawn yet.
    """

    kind: str
    step: int
    text: str
    response: str | None = None


def kinds(history: Sequence[Record]) -> list[str]:
    """The kinds of alarm that metrics call for, of those that `STEPS` lists.

    Args:
      history: metrics of a run, one object a step, the latest last.
    """
    trained = [line for line in history if "reward/mean" in line]
    evaluated = [line for line in history if "eval/accuracy" in line]
    hopeless = bool(evaluated) and not _solved(evaluated[-1])
    conditions: dict[str, Callable[[Record], bool]] = {
        "no reward": lambda line: line["reward/mean"] == 0 and line["groups/with_signal"] == 0,
        "cut": lambda line: line.get("response/cut", 0.0) >= NEARLY_ALL,
        "unanswered": lambda line: line.get("response/answered", 1.0) <= 1 - NEARLY_ALL,
        "one step": lambda line: 0 < line.get("response/steps", 0.0) <= ONE_STEP,
        "no step named": lambda line: line.get("reset/answer_boxed", 1.0) <= 1 - NEARLY_ALL,
        "no signal": lambda line: line["groups/with_signal"] == 0,
    }

    def sounds(kind: str) -> bool:
        steps = 1 if kind == "no reward" and hopeless else STEPS[kind]
        last = trained[-steps:]
        return len(last) == steps and all(map(conditions[kind], last))

    found = [kind for kind in STEPS if sounds(kind)]
    # Where there is no reward there is no signal either.
    return [kind for kind in found if kind != "no signal" or "no reward" not in found]


def describe(kind: str, record: Record, ends: Counter[str], config: Config, task: Task) -> str:
    """An alarm's text: what is seen, why it is likely so, what to change.

    Args:
      kind: of `STEPS`, or "nothing solved".
      record: metrics of the latest step, or evaluation.
      ends: why its responses ended, as rollouts say it, and how many of each.
      config: of the run.
      task: its delimiter and answer marker.
    """
    of = "eval" if kind == "nothing solved" else "response"
    answered, cut = record.get(f"{of}/answered", 1.0), record.get(f"{of}/cut", 0.0)
    if kind == "cut":
        return (
            "Nearly every response is cut, and what isn't finished is rarely right: "
            f"{_cut(cut, ends, config)}."
        )
    if kind == "unanswered":
        return f"Nearly no response has an answer: {_unanswered(answered, config, task)}."
    if kind == "one step":
        return (
            f"Nearly every response is one step ({record['response/steps']:.2f} on average), so a reset "
            f"goes back to the prompt: the policy doesn't write {task.delimiter!r}. Set task.delimiter to "
            "what stands between the steps that it writes, or show it some (task.examples)."
        )
    if kind == "no step named":
        return (
            "Asked for its first wrong step, the policy boxes a number in "
            f"{record['reset/answer_boxed']:.0%} of its answers; else resets go to a step that it only "
            "mentions, or to the first. Weigh every answer instead of having one written "
            "(reset.localizer.mode=score), give it more room (reset.localizer.max_tokens "
            f"{config.reset.localizer.max_tokens}), or reset at random (objective=rrpo)."
        )
    if kind == "no signal":
        reward = record["reward/mean"] or 0.0
        wanted = "easier" if reward < config.task.threshold else "harder"
        return (
            f"In {STEPS[kind]} steps no group had both right and wrong responses (mean reward "
            f"{reward:.3g}), so the reward teaches nothing. Use "
            f"{wanted} problems (data.path), or draw more "
            f"of each (reset.layout {config.reset.layout})."
        )
    if answered < 0.5:
        cause = _unanswered(answered, config, task)
    elif cut >= 0.5:
        cause = _cut(cut, ends, config)
    elif record.get("verifier/errors", 0) or record.get("verifier/timeouts", 0):
        cause = (
            f"the verifier failed on {record.get('verifier/errors', 0):.0f} responses and ran out of time "
            f"on {record.get('verifier/timeouts', 0):.0f}; see verifier_errors.jsonl"
        )
    else:
        cause = (
            "responses end and have an answer, but all are judged wrong. The problems may be too hard for "
            "the policy (data.path; objective=ladder is made for that), or the data's answers may not "
            "be what the verifier reads"
        )
    if kind == "nothing solved":
        return f"The first evaluation solved nothing: {cause}. To see one: jaxreset prompt CONFIG."
    return f"All rewards are 0, so nothing is learnt: {cause}."


def _cut(share: float, ends: Counter[str], config: Config) -> str:
    s = config.sampling
    steps = ends["steps"] > ends["budget"] + ends["length"]
    limit = (
        f"sampling.max_steps ({s.max_steps})"
        if steps
        else f"sampling.max_response_tokens ({s.max_response_tokens})"
    )
    return (
        f"{share:.0%} of the responses were cut by a limit. Raise {limit}, or use a model that ends its "
        "responses"
    )


def _unanswered(share: float, config: Config, task: Task) -> str:
    seen = (
        f"{share:.0%} of the responses hold the answer marker {task.answer_marker!r}: the policy doesn't "
        "write answers in the way that the prompt asks for. "
    )
    if config.model.path is None:
        return f"{seen}Give it a warm start (warm_start.steps)"
    return (
        f"{seen}Show it the format (task.examples), ask in its chat template (task.chat), name what it "
        "does write (task.answer_marker), or start with demonstrations (warm_start)"
    )


class Alarms:
    """Sounds each kind of alarm once a run, in the process that shows and writes.

    Args:
      config: of the run.
      task: of the run.
      file: where alarms are kept, one JSON object each; those there have sounded.
      history: metrics so far.
      show: shows an alarm, beside the log.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        file: Path,
        history: Sequence[Record],
        show: Callable[[Alarm], None] = lambda alarm: None,
    ):
        self._config, self._task, self._file, self._show = config, task, file, show
        self._history = list(history)
        self._sounded = {alarm.kind for alarm in read_alarms(file)}

    def start(self, eos_ids: Sequence[int]) -> None:
        """Before the first step: whether the policy can end a response."""
        if not eos_ids:
            source = self._config.model.path or "the policy's folder"
            self._sound(
                Alarm(
                    "no end",
                    self._history[-1]["step"] if self._history else 0,
                    "The policy has no end-of-sequence token: neither config.json, generation_config.json "
                    "nor the tokenizer names one that is in its vocabulary, so a response ends only at "
                    f"the step with its answer, or at a limit. Set eos_token_id in {source}/config.json.",
                )
            )

    def note(
        self, record: Record, trees: Sequence[Record] = (), response: str | None = None
    ) -> None:
        """After a step, or an evaluation: its metrics, and its reset trees, or one of its responses."""
        first = not any("eval/accuracy" in line for line in self._history)
        self._history.append(record)
        if first and "eval/accuracy" in record and not _solved(record):
            self._note("nothing solved", Counter(), response)
        rows = [row for tree in trees for group in tree["groups"] for row in group["rows"]]
        if rows:
            ends = Counter(row["end"] for row in rows)
            for kind in kinds(self._history):
                self._note(kind, ends, rows[0]["text"])

    def _note(self, kind: str, ends: Counter[str], response: str | None) -> None:
        record = self._history[-1]
        if kind == "one step" and self._config.make_objective().rule is None:
            return  # who doesn't reset needs no steps
        text = describe(kind, record, ends, self._config, self._task)
        shown = None if response is None else _shortened(response)
        self._sound(Alarm(kind, record["step"], text, shown))

    def _sound(self, alarm: Alarm) -> None:
        if not is_leader() or alarm.kind in self._sounded:
            return
        self._sounded.add(alarm.kind)
        with self._file.open("a") as file:
            file.write(dumps(alarm._asdict()) + "\n")
        shown = "" if alarm.response is None else f" A response: {alarm.response!r}"
        logger.warning("step %d: %s%s", alarm.step, alarm.text, shown)
        self._show(alarm)


def read_alarms(file: Path) -> list[Alarm]:
    """The alarms of a run."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [Alarm(**loads(line)) for line in lines if line.endswith("\n")]


def _solved(line: Record) -> bool:
    return bool(line["eval/accuracy"] or line.get("eval/greedy_accuracy"))


def _shortened(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"
