from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ml_backend.commands.heads import heads
from ml_backend.commands.train import train
from tests.worker.head.test_registry import make
from worker.head.registry import HeadRegistry


def call(*arguments: str) -> Result:
    return CliRunner().invoke(heads, list(arguments))


@pytest.fixture
def registry(data_dir: Path) -> HeadRegistry:
    made = HeadRegistry(data_dir)
    for name in ("project-3-v1", "project-3-v2"):
        make(made, name)
    return made


def test_use_pin_rollback(registry: HeadRegistry) -> None:
    assert "Project 3 uses project-3-v1, for tiny-1" in call("use", "project-3-v1", "--project", "3").output
    call("use", "project-3-v2", "--project", "3")
    assert "pinned" in call("pin", "--project", "3").output
    assert "(pinned)" in call("list").output
    assert "pinned" not in call("pin", "--off", "--project", "3").output
    assert "uses project-3-v1" in call("rollback", "--project", "3").output
    assert "uses the shipped head" in call("rollback", "--project", "3").output
    last = call("rollback", "--project", "3")
    assert (last.exit_code, last.output) == (
        2,
        "There is no earlier head to go back to. `bald-sam heads list` shows what there is.\n",
    )


def test_list(registry: HeadRegistry) -> None:
    registry.use("project-3-v2")
    found = json.loads(call("list", "--json").output)
    used = {row["name"]: row["used_by"] for row in found["heads"]}
    assert used == {"project-3-v1": [], "project-3-v2": ["default"], "shipped": []}
    assert found["in_use"]["default"]["head"] == "project-3-v2"
    assert "* project-3-v2" in call("list").output


def test_what_cannot_be_done_is_said() -> None:
    assert call("use", "gone").exit_code == 2
    away = call("list", "--redis-url", "redis://127.0.0.1:1")
    assert away.exit_code == 2 and "Redis cannot be reached" in away.output
    for arguments, words in (
        ([], "Give either --project"),
        (["--project", "3", "--data", "x"], "Give either --project"),
        (["--data", "x"], "Give the head a --name"),
        (["--project", "3"], "LABEL_STUDIO_API_KEY"),
    ):
        result = CliRunner().invoke(train, arguments)
        assert result.exit_code == 2 and words in result.output, result.output
