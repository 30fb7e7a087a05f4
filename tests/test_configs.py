"""The configs that are shipped: each loads, and each of the paper's ablations changes one thing."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from jaxreset.config_file import load_config

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "configs" / "paper"
GIVEN = {
    "gsm8k.yaml": ["model.path=folder", "data.path=train.jsonl"],
    "smollm2_sums.yaml": ["model.path=folder"],
    "gym.yaml": ["model.path=folder"],
    "smollm2_gym.yaml": ["model.path=folder"],
}
TABLE = (PAPER / "README.md").read_text(encoding="utf-8")
ABLATIONS = re.findall(r"^\| (\w+) \| `(\S+)` \|", TABLE, re.MULTILINE)


def leaves(values, path=""):
    """Each key's value by its dotted name."""
    if not isinstance(values, dict) or not values:
        return {path: values}
    found = (leaves(value, f"{path}.{key}" if path else key) for key, value in values.items())
    return {name: value for part in found for name, value in part.items()}


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda f: f.stem)
def test_every_config_loads_and_means_what_its_name_says(file):
    config = load_config(file, GIVEN.get(file.name, []))
    assert config.run.dir == f"runs/{file.stem}"
    assert config.make_objective().first_draw > 0
    if file.parent == PAPER:
        model, data, objective = file.stem.rsplit("_", 2)
        assert config.objective == objective
        assert config.method == "paper"
        assert config.task.name == {"numina": "math", "lcb": "code"}[data]
        assert model.partition("_")[0].replace("3", "") in config.model.path.lower().replace(
            "-", ""
        )


def test_the_papers_configs_differ_in_what_their_names_say():
    settings = {}
    for file in PAPER.glob("*.yaml"):
        values = leaves(load_config(file).model_dump(mode="json"))
        model, data, objective = file.stem.rsplit("_", 2)
        settings[model, data, objective] = values
    assert len(settings) == 2 * 2 * 3
    allowed = {
        0: ("model.path",),
        1: ("task.", "data.", "train.steps"),
        2: ("objective", "loss.", "reset.localizer."),
    }
    for one, its in settings.items():
        for other, others in settings.items():
            differ = [i for i in range(3) if one[i] != other[i]]
            if len(differ) == 1:
                keys = {k for k in its | others if its.get(k) != others.get(k)} - {"run.dir"}
                assert keys
                assert all(k.startswith(allowed[differ[0]]) for k in keys), (one, other, keys)


@pytest.mark.parametrize(("ablation", "override"), ABLATIONS)
def test_an_ablation_differs_in_one_way(ablation, override):
    key, _, value = override.partition("=")
    base = load_config(PAPER / "qwen2.5_14b_numina_srpo.yaml")
    other = load_config(PAPER / "qwen2.5_14b_numina_srpo.yaml", [override])
    before, after = (leaves(c.model_dump(mode="json")) for c in (base, other))
    differ = {name for name in before | after if before.get(name) != after.get(name)}
    # With one reset group and no base group the paper's localiser answers greedily.
    assert differ - ({"reset.localizer.temperature"} if value == "1x8" else set()) == {key}
    objectives = [dataclasses.asdict(c.make_objective()) for c in (base, other)]
    changed = {name for name, was in objectives[0].items() if objectives[1][name] != was}
    assert changed == {
        "reset.layout": {"base", "resets"} if value == "2x4" else {"base", "branches"},
        "reset.mask": {"mask"},
        "reset.drop_seeds": {"drop_seeds"},
        "reset.rule": {"rule"},
    }.get(key, set())
    losses = [c.loss.make() for c in (base, other)]
    assert (losses[0] != losses[1]) == (key == "loss.clip")


def test_every_ablation_of_the_paper_is_there():
    assert {name for name, _ in ABLATIONS} == {"layout", "mask", "seed", "clip", "localiser"}
