"""What a user brings: six files of examples/ named in a config, and the same six handed over as objects."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxreset import Experiment, Objective, Task, extensions, open_run, train
from jaxreset.config_file import dump_config, load_config, parse_config
from jaxreset.errors import CallbackError, ConfigError, PreemptedError
from jaxreset.models.adapters import trained
from jaxreset.run.compiles import compiles
from jaxreset.tasks.base import Problem

EXAMPLES = Path(__file__).parent.parent / "examples"
HOUSE = EXAMPLES / "open_house.yaml"
TINY = """
    model.fresh.layers=2 model.fresh.width=32 model.fresh.heads=2 model.fresh.kv_heads=2 model.fresh.mlp=64
    sampling.max_prompt_tokens=18 sampling.max_response_tokens=32 sampling.max_step_tokens=8
    warm_start.steps=5 warm_start.batch=8 train.steps=6 train.prompts_per_step=4
    train.microbatch_tokens=1500 train.min_signal_groups=0 data.eval_size=16 eval.batch=16
    checkpoint.every_steps=2
"""
TIMES = ("time/", "seconds", "compiles")
NAMES = "sorting", "brevity", "last_step", "ranks", "gspo", "stop_early"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)


@pytest.fixture
def house(monkeypatch):
    """The examples, importable; forgotten afterwards."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name)


def tiny(folder, *overrides):
    return load_config(HOUSE, [*TINY.split(), f"run.dir={folder}", *overrides])


def objects(house):
    return {
        "task": house["sorting"].Sorting(size=4),
        "reward": {"correct": "task", "brief": (house["brevity"].brief, 0.1)},
        "rule": house["last_step"].last_step,
        "advantage": house["ranks"].ranked,
        "form": house["gspo"].sequence_ratio,
        "callbacks": [house["stop_early"].when_solved],
    }


def plain(folder, *overrides):
    """The same config without what the six files bring."""
    values = {"objective": "rrpo", "run": {"dir": str(folder)}}
    for override in [*TINY.split(), *overrides]:
        key, _, value = override.partition("=")
        section, name = key.split(".", 1)
        inner = values.setdefault(section, {})
        *between, last = name.split(".")
        for part in between:
            inner = inner.setdefault(part, {})
        inner[last] = json.loads(value)
    return parse_config(values)


def repeatable(record):
    return {k: v for k, v in record.items() if not k.startswith(TIMES)}


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_in_haste")
def test_six_files_named_in_a_config_train_and_as_objects_give_the_same(house, tmp_path):
    named = train(tiny(tmp_path / "named"))
    assert named.history[-1]["stopped"] == "no reward in 3 steps"
    assert [line["step"] for line in named.history] == [0, 1, 2, 3]
    assert all("eval/accuracy" in line for line in (named.history[0], named.history[-1]))
    step = named.history[1]
    assert step["reward/mean"] == pytest.approx(step["reward/correct"] + 0.1 * step["reward/brief"])
    assert step["solved"] == step["reward/correct"]  # the callback's
    assert step["optimizer_steps"] == 1
    run = open_run(tmp_path / "named")
    assert run.config == tiny(tmp_path / "named", f"task.date={run.config.task.date}")
    assert run.steps == [2, 3]
    resets = [g for tree in run.trees() for g in tree["groups"] if g["parent_group"] is not None]
    assert resets
    assert {row["reward"] for g in resets for row in g["rows"]} <= {
        0.1 * row["rewards"]["brief"] for g in resets for row in g["rows"]
    }

    # Started again it has ended: nothing is trained, nothing written anew.
    again = train(tiny(tmp_path / "named"))
    assert again.history == named.history

    handed = train(plain(tmp_path / "handed"), **objects(house))
    assert [*map(repeatable, handed.history)] == [*map(repeatable, named.history)]
    for one, other in zip(
        jax.tree.leaves(trained(handed.policy.params)[0]),
        jax.tree.leaves(trained(named.policy.params)[0]),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    saved, theirs = open_run(tmp_path / "handed").config, run.config
    assert saved.task.name == theirs.task.name == "sorting:Sorting"
    assert (saved.reset, saved.loss, saved.run.callbacks) == (
        theirs.reset,
        theirs.loss,
        theirs.run.callbacks,
    )
    np.testing.assert_array_equal(
        jax.tree.leaves(open_run(tmp_path / "named").policy(3).params)[0],
        jax.tree.leaves(named.policy.params)[0],
    )

    # By hand, step by step.
    with Experiment(plain(tmp_path / "by_hand"), **objects(house)) as experiment:
        first = experiment.step()
        assert repeatable(first) == {
            k: v for k, v in repeatable(named.history[1]).items() if k not in ("solved", "stopped")
        }
        collected = experiment.collect(experiment.prompts())
        assert {g.prompt for g in collected} == set(range(4))
        learnt = experiment.learn(collected)
        for key in ("loss", "grad_norm", "learning_rate"):
            assert learnt[key] == named.history[2][key]
        assert experiment.steps_done == 2
        assert experiment.evaluate()["eval/problems"] == 16
    assert not (tmp_path / "by_hand").exists()


def test_a_run_says_what_it_cannot_find(house, tmp_path, monkeypatch):
    config = tiny(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert open_run(tmp_path).config.reset.rule == "last_step:last_step"
    for name in NAMES:
        sys.modules.pop(name)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(EXAMPLES)])
    run = open_run(tmp_path)
    with pytest.raises(ConfigError, match=r"reset\.rule: last_step:last_step: no module named"):
        _ = run.config
    assert run.history == []  # what needs none of it can be looked at all the same
    importlib.invalidate_caches()
    sys.path.insert(0, str(EXAMPLES))
    for name in NAMES:
        importlib.import_module(name)


# ---- Each wrong way is refused, by field and with what to do, before anything is compiled ----

MODULE = """
import os
number = 3
def no_arguments(): return 0
def one(failures): return [1 for f in failures]
def three(a, b, c): return 0
def unnamed(first, second): return 0.0
def shapeless(rewards, *, where): return rewards.sum()
def numpied(rewards, *, where): return float(rewards[0, 0])
def summed(logps, advantages, mask, *, behavior_logps): return logps.sum()
def narrow(logps, advantages): return logps
TOLD = __import__("jaxreset").Objective("oracle", base=4, resets=1, branches=4)
class Fine:
    def prompt(self, problem): return "?"
    def score(self, items): return [0.0 for _ in items]
class NoScore:
    def prompt(self, problem): return "?"
class Needy:
    def __init__(self, size): self.size = size
    def prompt(self, problem): return "?"
    def score(self, items): return [0.0 for _ in items]
"""
WRONG = [
    (
        "reset.rule=entropi",
        "reset.rule: no reset rule is called 'entropi'; did you mean 'entropy'?",
    ),
    ("reset.rule=nowhere_at_all:rule", "reset.rule: nowhere_at_all:rule: no module named"),
    (
        "reset.rule=wrong/ways.py:one",
        "reset.rule: wrong/ways.py:one: a file's path; expected package.mod",
    ),
    ("reset.rule=wrong_ways:onne", "wrong_ways has no 'onne'; did you mean 'one'?"),
    ("reset.rule=wrong_ways:a:b", "expected package.module:name, such as"),
    ("reset.rule=wrong_ways:number", "3 is no function; expected a function of (failures)"),
    ("reset.rule=wrong_ways:no_arguments", "wrong_ways:no_arguments() can't be called so"),
    ("reset.rule=broken_ways:one", "importing it raised ZeroDivisionError: division by zero"),
    ("reset.rule=typo_ways:one", "importing it raised SyntaxError"),
    (
        "reset.rule=lacking_ways:one",
        "importing it raised ModuleNotFoundError: No module named 'of_nobody'",
    ),
    ("reset.rule=__main__:rule", "was handed over as an object"),
    (
        "task.reward=wrong_ways:three",
        "task.reward.three.function: wrong_ways:three(a, b, c) can't be called so",
    ),
    ("task.reward=wrong_ways:unnamed", "takes (first, second), which doesn't say whether"),
    ("task.reward={a: {weight: 2}}", "task.reward.a.function: Field required"),
    (
        "task.reward=[wrong_ways:unnamed]",
        "expected an import path, or rewards by names of your own",
    ),
    ("task.reward={}", "expected at least one reward"),
    ("task.reward={mean: task}", "none called mean: reward/mean is their sum"),
    (
        "objective=wrong_ways:TOLD data.path=x task.name=wrong_ways:Fine",
        "reset.rule=oracle: task.name=wrong",
    ),
    ("task.name=chian", "task.name: no task is called 'chian'; did you mean 'chain'?"),
    (
        "task.name=wrong_ways:one",
        "is no class; expected a class with prompt(problem) and score(items)",
    ),
    ("task.name=wrong_ways:NoScore", "wrong_ways:NoScore has no score(items)"),
    (
        "task.name=wrong_ways:Needy data.path=x",
        "wrong_ways:Needy(size) can't be called so (missing",
    ),
    (
        "task.name=wrong_ways:Needy task.options.size=3",
        "data.path is null, but task.name=wrong_ways:Needy",
    ),
    ("task.options.size=3", "task.options.size: task.name=chain has no such option; it has none"),
    ("task.options.modulus=3", "task.options.modulus: it is a key of its own; set task.modulus"),
    (
        "task.name=gym task.options.generator=[gcd] model.path=./model",
        "task.options.generator: task.name=gym has no such option; did you mean 'generators'?",
    ),
    (
        "task.name=gym model.path=./model",
        "task.options.generators is missing; task.name=gym needs it",
    ),
    ("objective=srpoo", "no objective is called 'srpoo'; did you mean 'srpo'?"),
    ("objective=wrong_ways:number", "3 is no objective; expected a jaxreset.Objective"),
    ("loss.advantage=stdd", "loss.advantage: no advantage is called 'stdd'; did you mean 'std'?"),
    ("loss.advantage=wrong_ways:one", "wrong_ways:one(failures) can't be called so"),
    ("loss.advantage=wrong_ways:shapeless", "gave shape () for (3, 8)"),
    ("loss.advantage=wrong_ways:numpied", "can't be traced by JAX"),
    ("loss.form=wrong_ways:narrow", "wrong_ways:narrow(logps, advantages) can't be called so"),
    ("loss.form=wrong_ways:summed", "gave shape () for (2, 3, 8)"),
    ("loss.form=clipped", "no form of the loss is called 'clipped'"),
    (
        "run.callbacks=[wrong_ways:one]",
        "run.callbacks.0: wrong_ways:one(failures) can't be called so",
    ),
    (
        "run.callbacks=[wrong_ways:number]",
        "3 is no function; expected a function of (record, experiment)",
    ),
]


@pytest.fixture
def wrong_ways(tmp_path, monkeypatch):
    (tmp_path / "wrong_ways.py").write_text(MODULE)
    (tmp_path / "broken_ways.py").write_text("1 / 0\n")
    (tmp_path / "typo_ways.py").write_text("def one(failures: return\n")
    (tmp_path / "lacking_ways.py").write_text("import of_nobody\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n.endswith("_ways")]:
        sys.modules.pop(name)


@pytest.mark.parametrize(("overrides", "said"), WRONG, ids=[w[0] for w in WRONG])
def test_each_wrong_way_is_refused(wrong_ways, monkeypatch, overrides, said):
    monkeypatch.setattr(jax, "jit", None)  # nothing is compiled
    quickstart = EXAMPLES.parent / "configs" / "quickstart.yaml"
    asked = [overrides] if "{" in overrides else overrides.split()
    with pytest.raises(ConfigError) as refused:
        load_config(quickstart, ["warm_start.steps=0", *asked])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("handed", "said"),
    [
        ({"rule": 3}, "3 is no function"),
        ({"rule": lambda: [1]}, "can't be called so"),
        ({"task": Task}, "is a class; hand over an object of it"),
        ({"task": Task()}, "jaxreset.tasks.base:Task has no prompt(problem)"),
        ({"reward": lambda answer: 1.0}, "can't be called so"),
        ({"objective": Objective("random", base=1)}, "a group needs at least 2 rollouts"),
        ({"objective": "srpo4"}, "no objective is called 'srpo4'"),
        ({"callbacks": print}, "expected a list"),
        ({"advantage": lambda rewards: rewards}, "can't be called so"),
        (
            {"form": lambda logps, *rest, behavior_logps: logps[0]},
            "gave shape (3, 8) for (2, 3, 8)",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_objects_are_checked_as_names_are(handed, said):
    with pytest.raises(ConfigError) as refused:
        Experiment(parse_config({}), **handed)
    assert said in str(refused.value)


def test_objects_without_a_name_are_told_apart():
    first, second = (lambda failures: [1]), (lambda failures: [2])
    paths = [extensions.hand_over(thing) for thing in (first, second, first)]
    assert paths[0] == paths[2] != paths[1]
    assert [extensions.load(path) for path in paths] == [first, second, first]
    assert extensions.hand_over(test_objects_without_a_name_are_told_apart).endswith("_apart")


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_in_haste")
@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (
            "objective=ladder reset.rule=demo reset.rungs=2 reset.when=any_failure loss.credit=steps",
            "written",
        ),
        (
            "objective=ladder reset.rule=bisect reset.rungs=2 reset.when=any_failure loss.credit=steps",
            "drawn",
        ),
        ("objective=rrpo reset.rule=matched loss.advantage=loo", "drawn"),
        ("objective=srpo reset.rule=entropy reset.when=few_failed loss.advantage=mean", "drawn"),
    ],
    ids=lambda x: x.partition("rule=")[2].partition(" ")[0],
)
def test_rules_run_on_the_real_sampler_and_nothing_compiles_later(tmp_path, overrides, kept):
    """A fifth of the responses succeed at random, or where failures are to be few fail."""
    quickstart = EXAMPLES.parent / "configs" / "quickstart.yaml"
    config = load_config(
        quickstart,
        [*TINY.split(), "warm_start.steps=0", f"run.dir={tmp_path}", *overrides.split()],
    )

    def hard(problems, responses):
        few = config.reset.when == "few_failed"
        return [float((len(text) % 5 == 0) != few) for text in responses]

    with Experiment(config, reward={"hard": hard}) as experiment:
        experiment.compile()
        experiment.evaluate()
        before, met = compiles(), 0
        for _ in range(3):
            groups = experiment.collect(experiment.prompts())
            learnt = experiment.learn(groups)
            resets = [g for g in groups if g.reset_step is not None]
            met += len(resets)
            if kept == "written":
                for group in resets:
                    problem = next(
                        p for p in groups.trees[group.prompt]["question"].split("\n") if p
                    )
                    prompt, _, shown = experiment.decode(group.prefix).partition("\n")
                    solution = experiment.task.solution(Problem("p", problem, ""))
                    assert prompt == problem
                    assert shown.split() == solution[: group.reset_step - 1]
                    assert group.parent is None
            else:
                assert all(group.parent is not None for group in resets)
            if config.loss.credit == "steps" and kept == "drawn":
                credited = [g for g in groups if g.token_advantages is not None]
                assert {id(g) for g in credited} == {
                    id([h for h in groups if h.prompt == g.prompt][g.parent[0]]) for g in resets
                }
            assert np.isfinite(learnt["loss"])
            assert learnt["groups/with_signal"] > 0
        assert compiles() == before
        assert met > 0


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_in_haste")
def test_a_callback_costs_no_finished_step(tmp_path, monkeypatch):
    """One that raises, and one that stops a run that is asked to end before its last evaluation."""
    config = plain(tmp_path, "checkpoint.every_steps=100", "train.steps=9", "warm_start.steps=0")
    seen = []

    def watch(record, experiment):
        seen.append(record["step"])
        if seen == [1, 2]:
            raise KeyError("a slip")
        if record["step"] == 3:
            experiment.stop("enough")

    with pytest.raises(CallbackError, match=r"watch raised KeyError after step 2: 'a slip'"):
        train(config, callbacks=[watch])
    assert open_run(tmp_path).steps == [0, 2]
    evaluate = Experiment.evaluate

    def asked_to_end(*args):
        raise PreemptedError("SIGTERM")

    monkeypatch.setattr(Experiment, "evaluate", asked_to_end)
    with pytest.raises(PreemptedError):
        train(config, callbacks=[watch])
    assert open_run(tmp_path).steps[-1] == 3
    monkeypatch.setattr(Experiment, "evaluate", evaluate)
    last = train(config, callbacks=[watch]).history[-1]
    assert (last["step"], last["stopped"]) == (3, "enough")
    assert "eval/accuracy" in last
    assert seen == [1, 2, 3]


def test_the_summary_says_why_a_run_ended_early(tmp_path):
    from io import StringIO

    from rich.console import Console

    from jaxreset.reporting.display import Display

    shown = StringIO()
    history = [{"step": 0}, {"step": 3, "optimizer_steps": 1, "stopped": "95% [of] them are right"}]
    display = Display(Console(file=shown, width=120))
    display.summary(history, tmp_path, tmp_path / "curve.png")
    assert "stopped early after step 3: 95% [of] them are right" in shown.getvalue()


def test_a_callback_that_raises_ends_the_run_by_its_name(tmp_path):
    from types import SimpleNamespace

    from jaxreset.run.callbacks import call_back

    def broken(record, experiment):
        raise KeyError("accuracy")

    experiment = SimpleNamespace(callbacks=[broken], stopped=None)
    with pytest.raises(
        CallbackError, match=r"callback .*broken raised KeyError after step 4: 'accuracy'"
    ):
        call_back(experiment, {"step": 4})


REWARDS = """
import os
def from_here(problem, response): return float(os.getpid())
def heavy(problem, response):
    if response == "slow":
        while True: pass
    if response == "bad": raise ValueError("of the response")
    return len(response)
def together(problems, responses): return [float(os.getpid())] * len(responses)
"""


def test_a_reward_runs_in_processes_of_its_own_under_the_deadline(tmp_path, monkeypatch):
    import os

    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    one = "{function: my_rewards:heavy, weight: 2}"
    config = load_config(
        EXAMPLES.parent / "configs" / "quickstart.yaml",
        [
            f"task.reward={{pid: my_rewards:from_here, many: my_rewards:together, long: {one}}}",
            "task.cpu_seconds=0.4",
        ],
    )
    rewards = config.task.make_rewards(config.task.make())
    texts = ["", "abc", "slow", "bad"]
    scores = rewards.score([(Problem(f"p{n}", "?", "!"), text) for n, text in enumerate(texts)])
    rewards.close()
    assert os.getpid() not in scores.parts["pid"]
    assert set(scores.parts["many"]) == {os.getpid()}
    assert scores.parts["long"].tolist() == [0, 3, 0, 0]
    assert (scores.timeouts, scores.errors) == ((2,), (3,))
    assert "reward long: " in scores.reasons[0]
    assert "of the response" in scores.reasons[0]
    assert scores.rewards[3] == 0  # in all
    expected = scores.parts["pid"][:3] + os.getpid() + 2 * np.array([0, 3, 0])
    np.testing.assert_array_equal(scores.rewards[:3], expected)
    # A single function is logged by its own name.
    alone = load_config(
        EXAMPLES.parent / "configs" / "quickstart.yaml", ["task.reward=my_rewards:heavy"]
    )
    made = alone.task.make_rewards(alone.task.make())
    assert list(made.score([(Problem("p", "?", "!"), "ab")]).parts) == ["heavy"]
    made.close()
    sys.modules.pop("my_rewards")
