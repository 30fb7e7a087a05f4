"""The house: imports point one way, files are rooms, and no name means two things."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jaxreset"
FILES = sorted(ROOT.rglob("*.py"))

# From the ground up: each may import those before it, and itself where it is a folder.
LAYERS = (
    ("errors", "json_text", "disk", "extensions", "losses", "steps", "spelling"),
    ("parallel",),
    ("groups",),
    ("models",),
    ("sampling",),
    ("tasks",),
    ("resets",),
    ("learning",),
    ("config_names",),
    ("config_sections", "config_tasks", "config_data"),
    ("config",),
    ("config_file",),
    ("planning",),
    ("reporting",),
    ("run",),
    ("cli",),
    ("__init__", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ALONE = ("losses", "steps")  # usable without anything else of ours


def home(file):
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file):
    """The parts of the package that a file imports, functions' own imports too, types' alone not."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxreset"):
            _, _, rest = node.module.partition(".")
            yield from [rest.partition(".")[0]] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = (a.name for a in node.names if a.name.startswith("jaxreset."))
            yield from (name.split(".")[1] for name in names)


def test_every_part_has_its_place():
    assert {home(file) for file in FILES} == set(LEVEL)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    part = home(file)
    for other in imported(file):
        assert (
            other == part
            or LEVEL[other] < LEVEL[part]
            or (LEVEL[other] == LEVEL[part] and part not in ALONE and other not in ("__init__",))
        ), f"{part} imports {other}"
        assert part not in ALONE or other == part, f"{part} is usable alone, but imports {other}"


def test_rooms_are_small():
    long = {str(f.relative_to(ROOT)): n for f in FILES if (n := f.read_text().count("\n")) > 400}
    assert not long
    assert sum(f.read_text().count("\n") for f in (ROOT / "resets").glob("*.py")) <= 1000


def test_no_public_class_has_the_name_of_another():
    where = defaultdict(list)
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(str(file.relative_to(ROOT)))
    assert not {name: files for name, files in where.items() if len(files) > 1}


def test_below_the_config_nobody_reads_it():
    """It goes down from `run` and `planning` as plain values."""
    below = [f for f in FILES if LEVEL[home(f)] < LEVEL["config_names"]]
    assert len(below) > 60
    for file in below:
        assert not {"config", "config_names", "config_sections", "config_file"} & set(
            imported(file)
        ), file
