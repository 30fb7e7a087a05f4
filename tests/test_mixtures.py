"""Several files of problems in turns, what is held out, and a run that goes on with the same ones."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections import Counter
from decimal import Decimal
from itertools import accumulate
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import byte_tokenizer, random_policy
from rich.console import Console

from jaxreset.config_file import load_config, parse_config
from jaxreset.errors import ConfigError
from jaxreset.models.block import DecoderConfig
from jaxreset.run import parts
from jaxreset.run.dry_run import describe
from jaxreset.run.experiment import Experiment
from jaxreset.run.folder import RunFolder
from jaxreset.tasks.asking import Asking
from jaxreset.tasks.base import Problem
from jaxreset.tasks.fingerprint import Portion, differences, fingerprint
from jaxreset.tasks.math import MathTask
from jaxreset.tasks.mixture import Mixture, alternation, whole_numbers
from jaxreset.tasks.pipeline import PromptSource, read_problems
from jaxreset.tasks.records import Selection

GSM8K = Path(__file__).parent.parent / "configs" / "gsm8k.yaml"
QUICKSTART = GSM8K.with_name("quickstart.yaml")


def problems_of(name, count):
    return [Problem(f"{name}:{n}", f"{name} {n}?", str(n)) for n in range(1, count + 1)]


def write(path, count, first=0, **fields):
    """A file of so many problems."""
    rows = [
        {"problem": f"{path.stem} {n}?", "answer": n} | fields for n in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Turns


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_every_share_is_met_to_within_one_wherever_one_stops(shares):
    total = sum(shares)
    order = alternation(shares)
    assert order.shape == (total, 2)
    for file, share in enumerate(shares):
        mine = order[:, 0] == file
        assert order[mine, 1].tolist() == list(range(share))  # each of its turns, in order
        due = np.arange(1, total + 1) * share / total
        assert np.abs(np.cumsum(mine) - due).max() < 1


@given(st.integers(1, 40), st.integers(1, 40))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_of_two_files_any_window_has_its_share_to_within_one(one, other):
    total = one + other
    drawn = [0, *accumulate((alternation([one, other])[:, 0] == 0).tolist() * 2)]
    ahead = [count - Decimal(place * one) / total for place, count in enumerate(drawn)]
    assert max(ahead) - min(ahead) < 1


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": 1.0, "b": 1.0}, [1, 1]),
        ({"a": 0.7, "b": 0.3}, [7, 3]),
        ({"a": 0.1, "b": 0.2, "c": 0.25}, [2, 4, 5]),
        ({"a": 7473.0, "b": 12000.0}, [2491, 4000]),
        ({"a": 1e-05, "b": 1.0}, [1, 100_000]),
        ({"a": 3.0}, [1]),
    ],
)
def test_weights_in_whole_numbers(weights, expected):
    if sum(expected) > 100_000:
        with pytest.raises(
            ValueError, match="a 1e-05, b 1 are 1 : 100000 in whole numbers; expected"
        ):
            whole_numbers(weights)
    else:
        assert whole_numbers(weights) == expected


def test_small_files_are_repeated_in_another_order_each_time():
    """Each pass of each file has all of its problems once, however fast the passes are."""
    sizes, weights = {"big": 90, "small": 40, "one": 1}, {"big": 1.6, "small": 2.3, "one": 0.1}
    files = {name: problems_of(name, size) for name, size in sizes.items()}
    mixture = Mixture(files, weights, seed=3)
    count = 480
    drawn = [mixture[number] for number in range(count)]
    by_name = {name: [p.id for p in drawn if p.id.startswith(name)] for name in sizes}
    passes = {}
    for name, size in sizes.items():
        assert abs(len(by_name[name]) - count * weights[name] / 4) < 1
        whole = [by_name[name][i : i + size] for i in range(0, len(by_name[name]) - size + 1, size)]
        assert all(sorted(one) == sorted(p.id for p in files[name]) for one in whole)
        passes[name] = whole
    assert len({tuple(one) for one in passes["small"]}) == 6
    assert passes["big"][0] != passes["big"][1]


def test_a_mixture_is_told_by_its_seed_names_and_weights_alone():
    files = {name: problems_of(name, 60) for name in ("a", "b", "c")}
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    first = [Mixture(files, weights, seed=0)[n].id for n in range(60)]
    swapped = Mixture(files, dict(reversed(weights.items())), seed=0)
    assert [swapped[n].id for n in range(60)] == first
    assert [swapped[n].id for n in reversed(range(60))] == first[::-1]  # nothing is kept between
    assert [Mixture(files, weights, seed=1)[n].id for n in range(60)] != first
    in_order = {name: [p for p in first if p[0] == name] for name in files}
    assert len({tuple(p[2:] for p in drawn[:9]) for drawn in in_order.values()}) == 3  # own orders
    with pytest.raises(ValueError, match=r"data.path.b: no problem is left of it"):
        Mixture(files | {"b": []}, weights, seed=0)


@pytest.mark.parametrize("weights", [{}, {"a": 0.7, "b": 0.3}, {"a": 1.0, "b": 5.0}])
def test_a_source_goes_on_from_its_position_alone(weights):
    problems = problems_of("a", 90) + problems_of("b", 50)
    asking = Asking(MathTask(), byte_tokenizer())

    def source():
        return PromptSource(problems, asking, seed=5, weights=weights)

    whole = source()
    taken = [p for _ in range(60) for p in whole.next(4)]
    assert [prompt.number for prompt in taken] == list(range(240))
    for position in (0, 1, 7, 95, 226):
        later = source()
        later.position = position
        again = later.next(9) + later.next(5)
        assert later.position == position + 14
        for expected, found in zip(taken[position : position + 14], again, strict=True):
            assert (found.problem, found.number) == (expected.problem, expected.number)
            np.testing.assert_array_equal(found.tokens, expected.tokens)
    shares = Counter(p.problem.id[0] for p in taken)
    for name, weight in weights.items():
        assert abs(shares[name] - 240 * weight / sum(weights.values())) < 1


# What is held out


def test_the_end_of_each_file_is_held_out_in_proportion(tmp_path):
    files = {
        "big": Selection(write(tmp_path / "large.jsonl", 200), weight=3.0),
        "mid": Selection(write(tmp_path / "middle.jsonl", 100)),
        "one": Selection(write(tmp_path / "one.jsonl", 1)),
    }
    read = read_problems(files, None, test_size=500)
    assert list(read.test) == ["test"]
    assert Counter(p.id.partition(":")[0] for p in read.test["test"]) == {"big": 20, "mid": 10}
    assert [p.id for p in read.test["test"]][:2] == ["big:181", "big:182"]
    assert Counter(p.id.partition(":")[0] for p in read.train) == {"big": 180, "mid": 90, "one": 1}
    assert read.weights == {"big": 3.0, "mid": 1.0, "one": 1.0}
    assert {(p.key, p.problems, p.weight) for p in read.portions} == {
        ("data.path.big", 180, 3.0),
        ("data.path.mid", 90, 1.0),
        ("data.path.one", 1, 1.0),
        ("data.path.big, end", 20, None),
        ("data.path.mid, end", 10, None),
        ("data.path.one, end", 0, None),
    }
    for most, shares in ((7, {"big": 5, "mid": 2}), (1, {"big": 1}), (2, {"big": 1, "mid": 1})):
        few = read_problems(files, None, test_size=most)
        assert Counter(p.id.partition(":")[0] for p in few.test["test"]) == shares
        assert len(few.train) + most == 301
    with pytest.raises(ValueError, match=r"one.jsonl holds 1 problem, .* name data.eval_path"):
        read_problems({"one": files["one"]}, None, test_size=5)


def test_one_file_is_split_as_ever(tmp_path):
    path = write(tmp_path / "train.jsonl", 35)
    read = read_problems(path, None, test_size=500)
    assert [p.id for p in read.train] == [f"train:{n}" for n in range(1, 33)]
    assert [p.id for p in read.test["test"]] == ["train:33", "train:34", "train:35"]
    assert read.weights == {}
    assert len(read_problems(path, None, test_size=2).test["test"]) == 2


def test_held_out_sets_have_names(tmp_path):
    path = write(tmp_path / "train.jsonl", 12)
    sets = {
        "aime-24": Selection(write(tmp_path / "aime.jsonl", 5)),
        "amc": Selection(write(tmp_path / "amc.jsonl", 9), size=4),
    }
    read = read_problems(path, sets, test_size=3)
    assert {name: [p.id for p in found] for name, found in read.test.items()} == {
        "aime-24": ["aime-24:1", "aime-24:2", "aime-24:3"],
        "amc": ["amc:1", "amc:2", "amc:3"],
    }
    assert len(read.train) == 12
    single = read_problems(path, str(tmp_path / "amc.jsonl"), test_size=3)
    assert [p.id for p in single.test["test"]] == ["amc:1", "amc:2", "amc:3"]
    with pytest.raises(ValueError, match=r"data.eval_path.gone: .*gone.jsonl: no such file"):
        read_problems(path, {"gone": Selection("./gone.jsonl")}, test_size=3)
    with pytest.raises(ValueError, match=r"data.path.gone: .*gone.jsonl: no such file"):
        read_problems({"gone": Selection("./gone.jsonl")}, None, test_size=3)


def test_problems_that_are_trained_on_and_held_out_are_counted_once(tmp_path, caplog):
    rows = [{"problem": f"What is {n}?", "answer": n} for n in range(10)]
    again = [{"problem": f" What  is\n{n}? ", "answer": n} for n in (8, 3, 40)]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test.write_text("".join(json.dumps(row) + "\n" for row in again))
    with caplog.at_level(logging.WARNING, "jaxreset"):
        read = read_problems(
            str(train), {"one": Selection(str(test)), "two": Selection(str(test))}, test_size=9
        )
    assert read.repeated == 4
    [record] = caplog.records
    assert "4 of 6 held-out problems are also trained on" in record.message
    assert "the first: one:1 is train:9" in record.message
    caplog.clear()
    assert read_problems(str(train), None, test_size=9).repeated == 0
    assert not caplog.records


# The config


MATH = {"task": {"name": "math"}, "model": {"path": "x"}}


def data_of(**data):
    return parse_config(MATH | {"data": data}).data


def test_files_in_short_and_in_full():
    short = data_of(path="a.jsonl", where={"level": 5, "info": {"source": ["x", "y"]}}, size=3)
    where = {"level": (5,), "info.source": ("x", "y")}
    assert short.selections() == {"": Selection("a.jsonl", {}, where, 3)}
    assert short.eval_selections() is None
    columns = {"question": "Frage"}
    full = data_of(
        path={"a": "a.jsonl", "b": {"path": "b.jsonl", "weight": 2, "where": {}, "size": 4}},
        eval_path={"c": "c.jsonl", "d": {"path": "d", "columns": {}}},
        columns=columns,
        where=where,
    )
    assert full.selections() == {
        "a": Selection("a.jsonl", columns, where),
        "b": Selection("b.jsonl", columns, {}, 4, 2.0),
    }
    assert full.eval_selections() == {
        "c": Selection("c.jsonl", columns, where),
        "d": Selection("d", {}, where),
    }
    assert data_of(path="a", eval_path="b", size=3).eval_selections() == {"": Selection("b")}
    overrides = [
        "data.path.a=x",
        "data.path.b.path=y",
        "data.path.b.weight=3",
        "data.where.level=4",
    ]
    config = load_config(
        QUICKSTART, ["task.name=math", "model.path=x", "warm_start.steps=0", *overrides]
    )
    assert config.data.selections()["b"] == Selection("y", {}, {"level": (4,)}, None, 3.0)
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": 5}, "data.path: Input should be a valid string, got 5"),
        ({"path": {}}, "data.path: Dictionary should have at least 1 item"),
        ({"path": {"a:b": "x"}}, "data.path: 'a:b': expected a name of letters, digits, _ and -"),
        ({"path": {"a": 3}}, "data.path.a: Input should be a valid dictionary"),
        ({"path": {"a": {"weight": 1}}}, "data.path.a.path: Field required"),
        (
            {"path": {"a": {"path": "x", "weight": 0}}},
            "data.path.a.weight: Input should be greater",
        ),
        (
            {"path": {"a": {"path": "x", "weight": -1}}},
            "data.path.a.weight: Input should be greater",
        ),
        (
            {"path": {"a": {"path": "x", "wieght": 1}}},
            "data.path.a.wieght: unknown key; did you mean",
        ),
        (
            {"path": "x", "eval_path": {"a": {"path": "x", "weight": 1}}},
            "data.eval_path.a.weight: unknown key; known here: path, columns, where, size",
        ),
        ({"path": "x", "where": 3}, "data.where: Input should be a valid dictionary, got 3"),
        ({"path": "x", "where": {"a": []}}, "data.where.a: []: expected texts or numbers"),
        ({"path": "x", "where": {"a": {}}}, "data.where.a: [{}]: expected texts or numbers"),
        ({"path": "x", "where": {"a": None}}, "data.where.a: [None]: expected texts or numbers"),
        ({"path": "x", "where": {"a": [[1]]}}, "data.where.a: [[1]]: expected texts or numbers"),
        (
            {"path": "x", "where": {"a": float("nan")}},
            "data.where.a: [nan]: expected texts or numbers",
        ),
        ({"path": "x", "columns": {"a": 1}}, "data.columns.a: Input should be a valid string"),
        ({"path": "x", "size": 0}, "data.size: Input should be greater than 0"),
        ({"path": {"a": "x"}, "size": 3}, "data: size 3 with several files"),
    ],
)
def test_refused_sections(data, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        data_of(**data)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "data", [{"where": {"a": 1}}, {"columns": {"a": "b"}}, {"size": 3}, {"eval_path": "x"}]
)
def test_what_is_about_files_needs_one(data):
    [key] = data
    with pytest.raises(ConfigError, match=f"data: {key} without path: they are about files"):
        parse_config({"data": data})


# Fingerprints


PROBLEM = Problem("train:1", "How many?", "4", "2 + 2", (("system", "Count."),), {"tests": ["x"]})


def test_a_fingerprint_is_of_what_problems_say():
    base = fingerprint([PROBLEM, *problems_of("a", 2)])
    moved = Problem(**(vars(PROBLEM) | {"id": "other:9"}))
    assert fingerprint([moved, *problems_of("a", 2)]) == base
    changed = {
        "question": "How many? ",
        "answer": "5",
        "solution": "3 + 1",
        "context": (("system", "Count!"),),
        "extra": {"tests": ["y"]},
    }
    others = {fingerprint([Problem(**(vars(PROBLEM) | {k: v}))]) for k, v in changed.items()}
    others |= {fingerprint([]), fingerprint([PROBLEM]), fingerprint(problems_of("a", 2))}
    others.add(fingerprint([*problems_of("a", 2), PROBLEM]))
    assert len(others) == 9
    assert base not in others


def test_a_fingerprint_is_the_same_in_every_process():
    """What hashes and addresses are random in is no part of it."""
    code = (
        "from decimal import Decimal; import numpy as np\n"
        "from jaxreset.tasks.base import Problem\n"
        "from jaxreset.tasks.fingerprint import fingerprint\n"
        "extra = {'s': {'a', 'b', 'c'}, 'd': Decimal('1.50'), 'n': np.arange(3), 'o': object()}\n"
        "print(fingerprint([Problem('p', '?', '1', extra=extra)]))\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def portion(key="data.path", problems=40, mark="aa", **more):
    return Portion(key, "somewhere", problems, mark, **more)


def test_differences_are_named_by_their_keys():
    before = [portion("data.path.a", weight=1.0), portion("data.eval_path", 9, "bb")]
    assert differences(before, before[::-1]) == []
    assert differences(before, [p._replace(path="elsewhere", records=7) for p in before]) == []
    now = [portion("data.path.a", weight=2.0), portion("data.path.c", 1, "cc", weight=1.0)]
    assert differences(before, now) == [
        "data.path.a: 40 problems (aa, weight 1) there, 40 problems (aa, weight 2) now",
        "data.eval_path: 9 problems (bb) there, nothing now",
        "data.path.c: nothing there, 1 problems (cc, weight 1) now",
    ]


def saved_folder(path, *overrides):
    return RunFolder(load_config(QUICKSTART, [f"run.dir={path}", *overrides]))


def test_a_run_goes_on_with_the_same_problems_wherever_they_lie(tmp_path):
    folder = saved_folder(tmp_path, "data.path=a.jsonl")
    folder.check_writable()
    folder.keep_data([portion()])
    folder.claim()
    folder.keep_data([portion(problems=41)])  # before the first checkpoint it may start anew
    folder.keep_data([portion()])
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert json.loads((tmp_path / "data.json").read_text()) == [
        {
            "key": "data.path",
            "path": "somewhere",
            "problems": 40,
            "fingerprint": "aa",
            "weight": None,
            "records": None,
        }
    ]
    moved = saved_folder(tmp_path, "data.path=b.jsonl", "data.where={level: 5}", "data.size=40")
    moved.check_writable()
    moved.keep_data([portion()._replace(path="b.jsonl")])
    assert moved.claim()["data.path"] == ("a.jsonl", "b.jsonl")
    assert "b.jsonl" in (tmp_path / "data.json").read_text()
    before = (tmp_path / "data.json").read_text()
    other = re.escape(
        "(data.path: 40 problems (aa) there, 39 problems (bb) now); bring them back, or"
    )
    with pytest.raises(ConfigError, match=other):
        moved.keep_data([portion(problems=39, mark="bb")])
    assert (tmp_path / "data.json").read_text() == before
    (tmp_path / "data.json").write_text("[{")
    with pytest.raises(ConfigError, match=r"data.json isn't a run's .*bring it back from a backup"):
        moved.keep_data([portion()])


def test_an_older_run_goes_on_and_gets_a_fingerprint(tmp_path):
    folder = saved_folder(tmp_path, "data.path=a.jsonl")
    folder.check_writable()
    folder.claim()
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"data.path: 'a.jsonl' there, 'b.jsonl' asked"):
        saved_folder(tmp_path, "data.path=b.jsonl").check_writable()
    folder.check_writable()
    folder.keep_data([portion()])
    saved_folder(tmp_path, "data.path=b.jsonl").check_writable()
    with pytest.raises(ConfigError, match="holds a run on other problems"):
        folder.keep_data([portion(mark="bb")])


def test_processes_that_read_different_problems_are_told(tmp_path, monkeypatch):
    config = parse_config(MATH | {"data": {"path": write(tmp_path / "train.jsonl", 30)}})
    task = config.task.make()
    mine = parts.read_or_make_problems(config, task).portions
    theirs = (mine[0]._replace(problems=26, fingerprint="cc"), *mine[1:])
    monkeypatch.setattr(parts, "gather", lambda items: [*items, *items])
    parts.read_or_make_problems(config, task)
    monkeypatch.setattr(parts, "gather", lambda items: [*items, theirs])
    with pytest.raises(
        ValueError,
        match=r"data.path: 27 problems \(\w+\) in process 0, 26 problems \(cc\) in process 1; name files",
    ):
        parts.read_or_make_problems(config, task)


def test_problems_that_a_task_makes_are_told_by_their_parameters():
    config = load_config(QUICKSTART)

    def mark(config):
        [made] = parts.read_or_make_problems(config, config.task.make()).portions
        return made

    assert mark(config) == mark(load_config(QUICKSTART))
    assert mark(config).problems == config.data.chain_size
    other = mark(load_config(QUICKSTART, ["data.eval_size=7"]))
    assert other.fingerprint != mark(config).fingerprint


# A whole experiment


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = DecoderConfig(
        vocab=320, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, mlp=16,
        qkv_bias=True,
    )  # fmt: skip
    random_policy(sizes, byte_tokenizer()).export(folder)
    return folder


@pytest.fixture
def config_of(model, tmp_path, monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    write(tmp_path / "easy.jsonl", 40, level="Level 1")
    write(tmp_path / "hard.jsonl", 30, level="Level 5")
    write(tmp_path / "other.jsonl", 5)
    paths = [
        f"data.path.easy={tmp_path}/easy.jsonl",
        f"data.path.hard={{path: {tmp_path}/hard.jsonl, weight: 3, where: {{level: 5}}}}",
    ]

    def make(*overrides, paths=paths):
        values = [f"model.path={model}", "data.path={}", *paths, *overrides]
        return load_config(GSM8K, values)

    return make


def test_an_experiment_on_a_mixture_with_named_held_out_sets(config_of, tmp_path):
    sets = [f"data.eval_path={{end: {tmp_path}/hard.jsonl, other: {tmp_path}/other.jsonl}}"]
    with Experiment(config_of(*sets)) as experiment:
        assert list(experiment.problems.test) == ["end", "other"]
        main, other = experiment.test_prompts(), experiment.test_prompts("other")
        assert [p.problem.id for p in main] == [f"end:{n}" for n in range(1, 31)]
        assert [p.problem.id for p in other] == [f"other:{n}" for n in range(1, 6)]
        assert [p.number for p in other] == list(range(5))
        first = experiment.prompts(40) + experiment.prompts(8)
        shares = Counter(p.problem.id.partition(":")[0] for p in first)
        assert shares == {"hard": 36, "easy": 12}
        experiment.source.position = 17
        assert [p.problem for p in experiment.prompts(9)] == [p.problem for p in first[17:26]]


def test_an_overlong_file_of_a_mixture_is_named(config_of, tmp_path):
    long = [{"problem": "ten " * 900, "answer": 1}] * 9
    (tmp_path / "hard.jsonl").write_text(
        "".join(json.dumps(row | {"level": "Level 5"}) + "\n" for row in long)
    )
    with pytest.raises(
        ConfigError, match=r"data.path.hard: no problem is left of it; leave it out"
    ):
        Experiment(config_of())


def test_a_dry_run_says_how_many_records_are_kept(config_of, tmp_path):
    lines = [
        json.dumps({"problem": f"{n}?", "answer": n, "level": f"Level {n % 5 + 1}"})
        for n in range(50)
    ]
    (tmp_path / "hard.jsonl").write_text("\n".join(lines))
    console = Console(record=True, width=300)
    describe(config_of(f"data.eval_path={tmp_path}/other.jsonl"), console)
    shown = console.export_text()
    assert "50 to train on, 5 held out, 0 dropped" in shown
    assert f"data.path.easy      40 of 40 records read, weight 1: {tmp_path}/easy.jsonl" in shown
    assert f"data.path.hard      10 of 50 records read, weight 3: {tmp_path}/hard.jsonl" in shown
    assert f"data.eval_path      5 of 5 records read: {tmp_path}/other.jsonl" in shown
    assert "repeated" not in shown
