"""docs/reliability.md: every row names its tests, and every test that is named exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs/reliability.md").read_text().splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| fault"))
]
#: What must be in the table, by a word of its first column.
FAULTS = ["worker dies", "Redis is dead", "memory empty", "Redis is full", "disk", "Label Studio is slow"]
FAULTS += ["Label Studio (or", "token", "cached embedding", "head", "GPU", "clock"]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_names_tests_that_exist(row: list[str]) -> None:
    fault, seen, again, tests = row
    assert fault and seen and again
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert len(named) == tests.count("`") / 2 > 0
    for path, name in named:
        assert name in functions(ROOT / path), f"{path}::{name}"


@pytest.mark.parametrize("word", FAULTS)
def test_no_fault_is_left_out(word: str) -> None:
    assert any(word in row[0] for row in ROWS)
