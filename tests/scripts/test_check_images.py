"""What `scripts/check_images.py` reads; that it ends well is for whoever changes docker/, for it takes minutes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def check() -> Any:
    sys.path.append(str(ROOT / "scripts"))
    return importlib.import_module("check_images")


def test_every_instruction_is_known(check: Any) -> None:
    targets = check.read_dockerfile((ROOT / "docker/Dockerfile").read_text())
    for name in check.SERVICES:
        target = targets[name]
        assert ("RUN", f"pip install --no-deps -r {name}.lock") in target.steps
        assert target.environment["BALD_SAM_DATA_DIR"] == "/data"
        assert target.command[0] == "bald-sam"
        assert [word for word, rest in target.steps if word == "RUN" and rest.startswith("useradd ")] == ["RUN"]
    with pytest.raises(ValueError, match="ADD"):
        check.read_dockerfile("FROM a AS b\nADD c d\n")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("worker/tasks.py", True),
        ("worker/weights/tiny.safetensors", True),
        ("worker/__pycache__/tasks.pyc", False),
        ("docker/worker.lock", True),
        ("docker/env.example", False),
        ("tests/conftest.py", False),
        (".env", False),
        ("README.md", True),
    ],
)
def test_what_enters_the_build(check: Any, path: str, expected: bool) -> None:
    assert check.let_through(path) is expected


def test_folders_are_copied_without_what_is_ignored(check: Any, tmp_path: Path) -> None:
    check.copy(["worker"], tmp_path / "worker")
    check.copy(["docker/worker.lock"], tmp_path)
    assert (tmp_path / "worker/weights/tiny.safetensors").is_file()
    assert (tmp_path / "worker.lock").is_file()
    assert not list(tmp_path.rglob("__pycache__"))


def test_settings_of_a_service_are_whole(check: Any) -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    found = check.settings_of(services["ml_backend"], "redis://r")
    assert found["BALD_SAM_REDIS_URL"] == "redis://r"
    assert found["BALD_SAM_BASIC_AUTH_PASS"] == "a-password"
    assert found["BALD_SAM_BACKBONE"] == "tiny"
    assert not [value for value in found.values() if "$" in value]
