"""What the policy is shown and what it makes of it: the first thing to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxreset.config import Config
from jaxreset.models.policy import Policy
from jaxreset.parallel import data_shards
from jaxreset.run.checkpoints import saved_steps
from jaxreset.run.experiment import Experiment
from jaxreset.run.finished import started_from, trained_to
from jaxreset.run.folder import RunFolder
from jaxreset.sampling.rounds import Round, Shape, StopReason, StopRules, Stream
from jaxreset.sampling.sampler import Sampler
from jaxreset.tasks.pipeline import Prompt
from jaxreset.tasks.scoring import score_alone

BORDER = 6  # tokens shown one by one at either end

ENDED = {
    StopReason.EOS: "at its end-of-sequence token",
    StopReason.ANSWER: "with the step that holds the answer marker",
    StopReason.STOP_STRING: "at a text of task.stop",
    StopReason.STEPS: "cut at sampling.max_steps",
    StopReason.BUDGET: "cut: no room for another step in sampling.max_response_tokens",
    StopReason.LENGTH: "cut at sampling.max_response_tokens",
}


def preview(config: Config, console: Console, *, count: int = 2, sample: bool = True) -> None:
    """Prints the first training prompts as the policy gets them, each with a response and its verdict.

    The run's latest checkpoint answers where there is one, else what training starts from.

    Args:
      config: resolved.
      console: where to.
      count: of prompts.
      sample: whether responses are drawn.

    Raises:
      ConfigError: as a run would.
    """
    folder = RunFolder(config)
    folder.check_same_policy()
    with Experiment(folder.dated()) as experiment:
        prompts = experiment.prompts(count)
        if not sample:
            for prompt in prompts:
                show_prompt(experiment, prompt, console)
            return
        policy = started_from(folder, experiment.start_policy, experiment.mesh)
        step = 0
        if saved_steps(folder.checkpoints):
            step, policy = trained_to(folder, policy)
        sampler, round_ = _drawn(experiment, policy, prompts)
        items = [
            (p.problem, experiment.decode(round_.response(n, 0))) for n, p in enumerate(prompts)
        ]
        scores = score_alone(experiment.score, items)
        errors = dict(zip(scores.errors, scores.reasons, strict=True))
        for n, prompt in enumerate(prompts):
            show_prompt(experiment, prompt, console)
            _show_response(experiment, sampler, round_, n, prompt, console, step)
            failed = _show_verdict(
                experiment, prompt, items[n][1], float(scores.rewards[n]), errors.get(n), console
            )
            if failed and "ask" in experiment.objective.needs:
                _show_question(experiment, sampler, round_.response(n, 0), prompt, console)


def show_prompt(experiment: Experiment, prompt: Prompt, console: Console) -> None:
    """A prompt whole, special tokens in colour, and the tokens at its borders one by one."""
    tokenizer, task = experiment.asking.tokenizer, experiment.task
    how = "in the chat template" if experiment.asking.in_template else "as raw text"
    console.rule(
        f"problem {prompt.problem.id}: {len(prompt.tokens)} tokens of at most "
        f"{experiment.config.sampling.max_prompt_tokens}, asked {how}"
    )
    console.print(_colored(tokenizer, prompt.tokens), soft_wrap=True)
    console.print(
        f"begins with  {_one_by_one(tokenizer, prompt.tokens[:BORDER])}",
        soft_wrap=True,
        markup=False,
    )
    console.print(
        f"ends with    {_one_by_one(tokenizer, prompt.tokens[-BORDER:])}",
        soft_wrap=True,
        markup=False,
    )
    console.print(
        f"a step ends with {task.delimiter!r}, the last step holds {task.answer_marker!r}",
        soft_wrap=True,
        markup=False,
    )


def _drawn(
    experiment: Experiment, policy: Policy, prompts: Sequence[Prompt]
) -> tuple[Sampler, Round]:
    """One response to each prompt, from a sampler that is compiled for no more than that."""
    config, s = experiment.config, experiment.config.sampling
    shards = 1 if experiment.mesh is None else data_shards(experiment.mesh)
    groups = -(-len(prompts) // shards) * shards
    sampler = Sampler.for_policy(
        policy,
        StopRules(s.max_response_tokens, s.max_steps, s.max_step_tokens),
        delimiter=experiment.task.delimiter,
        answer_marker=experiment.task.answer_marker,
        stop_strings=config.task.stop,
        shapes=[Shape(groups, 1, s.max_prompt_tokens, s.max_response_tokens)],
        hold_cache="never",
        mesh=experiment.mesh,
    )
    draw: dict[str, Any] = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k}
    ids = [p.number for p in prompts]
    stream = Stream(config.seed, 1)  # as the run's first step draws
    return sampler, sampler.sample(
        policy, [p.tokens for p in prompts], rows=1, stream=stream, ids=ids, **draw
    )


def _show_response(
    experiment: Experiment,
    sampler: Sampler,
    round_: Round,
    n: int,
    prompt: Prompt,
    console: Console,
    step: int,
) -> None:
    """The response step by step, and why it ended."""
    tokens, tokenizer = round_.response(n, 0), experiment.asking.tokenizer
    spans = sampler.steps(tokens)
    reason = StopReason(int(round_.reasons[n, 0]))
    whose = "the policy that training starts from" if step == 0 else f"the policy after step {step}"
    console.print()
    console.print(
        f"response of {whose}: {len(tokens)} tokens, {len(spans)} steps, ended "
        f"{ENDED.get(reason, reason.name)}",
        style="bold",
        soft_wrap=True,
    )
    for number, (first, stop) in enumerate(spans, 1):
        line = Text(f"{number:3}  ", style="bold").append_text(
            _colored(tokenizer, tokens[first:stop], quoted=True)
        )
        console.print(line, soft_wrap=True)
    if behind := tokens[spans[-1][1] if spans else 0 :].tolist():
        console.print(
            f"     behind it: {_one_by_one(tokenizer, behind)}", markup=False, soft_wrap=True
        )


def _show_verdict(
    experiment: Experiment,
    prompt: Prompt,
    text: str,
    reward: float,
    error: str | None,
    console: Console,
) -> bool:
    """The reward and what speaks for or against it; returns whether the response failed."""
    problem, task = prompt.problem, experiment.task
    there = task.answer_marker in text
    failed = reward < experiment.config.task.threshold
    words = [f"reward {reward:g} ({'failed' if failed else 'solved'})"]
    words.append(f"answer marker {task.answer_marker!r} {'found' if there else 'NOT found'}")
    if problem.answer:
        words.append(f"the answer is {problem.answer!r:.100}")
    if error is not None:
        words.append(f"the verifier failed: {error.strip().rpartition(chr(10))[2]:.200}")
    color = "red" if failed else "green"
    console.print(", ".join(words), style=color, markup=False, soft_wrap=True)
    console.print()
    return failed


def _show_question(
    experiment: Experiment, sampler: Sampler, response: np.ndarray, prompt: Prompt, console: Console
) -> None:
    """What the policy would be asked about this failure."""
    asking, ask = experiment.asking, experiment.config.reset.localizer
    end = experiment.task.delimiter.strip()
    texts = [experiment.decode(response[a:b]).strip() for a, b in sampler.steps(response)]
    if not texts:
        console.print("it has no step, so it isn't reset", style="dim")
        return
    put = asking.inline_question if ask.mode == "inline" else asking.question
    tokens = put(prompt.problem, [text.removesuffix(end).strip() for text in texts])
    console.print(
        f"where it went wrong would be asked in {len(tokens)} tokens of at most "
        f"reset.localizer.max_question_tokens={ask.max_question_tokens}:",
        style="bold",
        soft_wrap=True,
    )
    console.print(_colored(asking.tokenizer, tokens), style="dim", soft_wrap=True)


def _colored(tokenizer: Any, tokens: Sequence[int] | np.ndarray, *, quoted: bool = False) -> Text:
    """Tokens as text, the special ones in colour; quoted: line breaks and other marks written out."""
    special, text = set(tokenizer.all_special_ids), Text()
    run: list[int] = []

    def flush() -> None:
        if run:
            plain = tokenizer.decode(run, clean_up_tokenization_spaces=False)
            text.append(repr(plain)[1:-1] if quoted else plain)
            run.clear()

    for token in map(int, tokens):
        if token in special:
            flush()
            text.append(tokenizer.convert_ids_to_tokens(token), style="magenta")
        else:
            run.append(token)
    flush()
    return text


def _one_by_one(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> str:
    """Each token by itself: its id, and its text with line breaks and spaces written out."""
    shown = (f"{int(t)} {tokenizer.decode([int(t)])!r}" for t in tokens)
    return " · ".join(shown)
