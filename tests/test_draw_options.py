"""Each draw option of rollouts, of evaluation and of localisation is a key, and reaches the sampler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml
from scripted import PROBLEMS, TASK, ScriptedRounds, decode, prompts

from jaxreset.config_file import dump_config, load_config, parse_config
from jaxreset.planning.shapes import run_shapes
from jaxreset.resets.localize import PolicyLocalizer
from jaxreset.run.experiment import Experiment
from jaxreset.run.parts import make_localizer

DRAWN = {"temperature": 0.7, "top_p": 0.95, "top_k": 20}


def options(section):
    return {name: getattr(section, name) for name in DRAWN}


def test_what_is_not_given_is_the_samplings_and_is_written_out():
    config = parse_config({"sampling": DRAWN})
    for section in (config.eval, config.reset.localizer):
        assert options(section) | {"temperature": 0.7} == DRAWN
    assert (config.eval.temperature, config.reset.localizer.temperature) == (1.0, 0.3)
    saved = yaml.safe_load(dump_config(config))
    assert (saved["eval"]["top_p"], saved["reset"]["localizer"]["top_k"]) == (0.95, 20)
    assert parse_config(saved) == config
    plain = parse_config({})
    assert options(plain.eval) == {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def test_what_is_given_stays():
    given = {"temperature": 0.6, "top_p": 1.0, "top_k": 0}
    config = parse_config({"sampling": DRAWN, "eval": given, "reset": {"localizer": given}})
    assert options(config.eval) == options(config.reset.localizer) == given
    assert options(config.sampling) == DRAWN


@pytest.mark.parametrize("given", [{}, {"temperature": 0.5, "top_p": 0.8, "top_k": 3}])
def test_evaluation_draws_as_configured_and_greedily(given):
    rounds = ScriptedRounds(lambda prompt, phase, row, kept: "\\boxed{6}\n")
    rounds._draw = forgetting(rounds)
    experiment = SimpleNamespace(
        config=parse_config({"sampling": DRAWN, "eval": {"batch": 2, **given}}),
        sampler=rounds,
        task=TASK,
        decode=decode,
        score=TASK.score,
        collector=SimpleNamespace(interrupt=lambda: None, keep_errors=lambda errors: None),
        problems=SimpleNamespace(test={"test": PROBLEMS}),
        test_prompts=lambda name: prompts(0, 1, 2),
    )
    record = Experiment.evaluate(experiment, SimpleNamespace(version=0), 4)
    sampled, greedy = rounds.calls[:2], rounds.calls[2:]
    expected = {"temperature": 1.0, "top_p": 0.95, "top_k": 20} | given
    assert [call.options for call in sampled] == [expected] * 2
    assert [call.options["temperature"] for call in greedy] == [0.0] * 2
    assert record["eval/accuracy"] == pytest.approx(2 / 3)  # of PROBLEMS, two sum to 6
    assert [p.answer for p in PROBLEMS].count("6") == 2


def forgetting(rounds):
    """Greedy and sampled draws share their names, since greedy ones use no random number."""
    draw = rounds._draw

    def again(*args):
        rounds._seen.clear()
        return draw(*args)

    return again


@pytest.mark.parametrize("mode", ["generate", "inline", "score"])
@pytest.mark.parametrize("given", [{}, {"temperature": 0.5, "top_p": 0.8, "top_k": 3}])
def test_every_localizer_draws_as_configured(policy32, mode, given):
    config = parse_config(
        {"sampling": DRAWN, "reset": {"localizer": {"mode": mode, **given}}, "run": {"dir": "x"}}
    )
    shapes = run_shapes(config, config.make_objective())
    asking = config.task.make_asking(TASK, policy32.tokenizer)
    made = make_localizer(config, shapes, asking, policy32, None)
    expected = {"temperature": 0.3, "top_p": 0.95, "top_k": 20} | given
    if isinstance(made, PolicyLocalizer):
        assert made._draw == {"rows": 1} | expected
    else:
        assert options(made) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.top_p=0", r"eval\.top_p: .*greater than 0, got 0"),
        ("eval.top_k=-1", r"eval\.top_k: .*greater than or equal to 0, got -1"),
        ("reset.localizer.top_p=1.1", r"reset\.localizer\.top_p: .*equal to 1, got 1\.1"),
        ("task.date=yesterday", r"task\.date: .*date.*got 'yesterday'"),
        ("task.enable_thinking=maybe", r"task\.enable_thinking: .*boolean.*got 'maybe'"),
    ],
)
def test_impossible_options_are_refused(tmp_path, override, message):
    file = tmp_path / "config.yaml"
    file.write_text("objective: srpo\n")
    with pytest.raises(ValueError, match=message):
        load_config(file, [override])
