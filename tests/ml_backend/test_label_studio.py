"""The environment of Label Studio is made once and nobody else's is touched. The server itself runs in tests/e2e."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from ml_backend import label_studio
from ml_backend.label_studio import LabelStudioServer
from ml_backend.label_studio_api import LabelStudioError


def test_the_pinned_requirements_hold_no_address_and_the_version():
    lines = [line for line in label_studio.LOCK.read_text().splitlines() if line and not line.startswith("#")]
    assert f"label-studio=={label_studio.VERSION}" in lines
    assert all(line.count("==") == 1 and "/" not in line and "@" not in line for line in lines)


def test_a_finished_environment_is_used_as_it_is(tmp_path, monkeypatch):
    command = label_studio.command_of(tmp_path)
    command.parent.mkdir(parents=True)
    command.touch()
    (tmp_path / ".requirements-sha256").write_text(hashlib.sha256(label_studio.LOCK.read_bytes()).hexdigest())
    monkeypatch.setattr(subprocess, "run", None)
    assert label_studio.ensure_environment(tmp_path) == command


def test_a_folder_of_somebody_else_is_refused_and_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(LabelStudioError, match="BALD_SAM_LABEL_STUDIO_ENV"):
        label_studio.ensure_environment(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_installation_says_why_and_is_repeated(tmp_path, monkeypatch):
    said: list[str] = []
    commands: list[list[str]] = []

    def run(command, **_):
        commands.append(command)
        failing = "pip" in command
        return subprocess.CompletedProcess(command, int(failing), "", "WARNING: chatter\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(LabelStudioError, match="no network"):
            label_studio.ensure_environment(tmp_path / "env", said.append)
    assert len(said) == 2
    assert all("--no-deps" in command for command in commands if "pip" in command)
    assert not any("index" in part for command in commands for part in command)


def test_a_server_that_ends_at_once_gives_its_last_words(tmp_path):
    script = tmp_path / "label-studio"
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('the database is locked')\n")
    script.chmod(0o755)
    server = LabelStudioServer(script, data_dir=tmp_path / "data", port=0, email="a@b.c", password="p")
    with pytest.raises(LabelStudioError, match="the database is locked"), server:
        raise AssertionError("it started")
    assert not server.runs()


def test_nothing_of_the_callers_environment_leaks_in(tmp_path, monkeypatch):
    monkeypatch.setenv("LABEL_STUDIO_BASE_DATA_DIR", "/elsewhere")
    monkeypatch.setenv("DJANGO_DB", "default")
    environment = LabelStudioServer(tmp_path, data_dir=tmp_path, port=0, email="a@b.c", password="p")._environment()
    assert environment["LABEL_STUDIO_BASE_DATA_DIR"] == str(tmp_path)
    assert environment["DJANGO_DB"] == "sqlite"
    assert environment["USE_DEFAULT_BANNED_SUBNETS"] == "false"
    assert environment["SENTRY_DSN"] == ""
