"""`bald-sam demo` where it refuses, what it remembers, and its pictures. The whole of it runs in tests/e2e."""

from __future__ import annotations

import fcntl
import json
import socket
import stat
from collections.abc import Iterator

import pytest
from click.testing import CliRunner
from PIL import Image

from ml_backend import demo_pictures
from ml_backend.commands.demo import demo
from ml_backend.demo_project import State


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("option", ["--port", "--label-studio-port"])
def test_a_taken_port_is_one_line_and_exit_2(taken_port, option, data_dir):
    result = CliRunner().invoke(demo, [option, str(taken_port)])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert f"Port {taken_port} is taken" in result.output
    assert option in result.output


def test_the_same_port_twice_is_refused(data_dir):
    result = CliRunner().invoke(demo, ["--port", "18999", "--label-studio-port", "18999"])
    assert result.exit_code == 2
    assert "two different ports" in result.output


def test_a_folder_without_images_is_refused_before_anything_starts(tmp_path, data_dir):
    (tmp_path / "notes.txt").write_text("no picture")
    result = CliRunner().invoke(demo, ["--images", str(tmp_path), "--port", "0", "--label-studio-port", "0"])
    assert result.exit_code == 2
    assert "There is no image in" in result.output


def test_a_missing_package_is_one_line_and_exit_2(monkeypatch, data_dir):
    def missing(folder):
        raise ModuleNotFoundError("No module named 'skimage'", name="skimage")

    monkeypatch.setattr("ml_backend.commands.demo.sample_pictures", missing)
    result = CliRunner().invoke(demo, ["--port", "0", "--label-studio-port", "0"])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "skimage" in result.output
    assert "pip install" in result.output


def test_reset_sets_the_former_demo_aside(tmp_path, data_dir):
    former = data_dir / "demo"
    former.mkdir(parents=True)
    (former / "annotations").write_text("work of an afternoon")
    arguments = ["--reset", "--images", str(tmp_path), "--port", "0", "--label-studio-port", "0"]
    (tmp_path / "broken.png").write_bytes(b"")
    CliRunner(env={"BALD_SAM_LABEL_STUDIO_ENV": "/dev/null/nowhere"}).invoke(demo, arguments)
    (kept,) = data_dir.glob("demo-*/annotations")
    assert kept.read_text() == "work of an afternoon"


def test_a_second_demo_on_the_same_data_is_refused(tmp_path, data_dir):
    (data_dir / "demo").mkdir(parents=True)
    with (data_dir / "demo" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = CliRunner().invoke(demo, ["--reset", "--port", "0", "--label-studio-port", "0"])
    assert result.exit_code == 2
    assert "A demo runs already" in result.output
    assert (data_dir / "demo" / "lock").exists()


def test_the_state_survives_and_only_its_owner_reads_it(tmp_path):
    path = tmp_path / "demo" / "demo.json"
    state = State.load(path)
    state.token = "secret"
    state.projects["samples"] = {"id": 4, "uploaded": ["a.png"]}
    state.save()
    assert State.load(path) == state
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["projects"]["samples"]["id"] == 4


def test_sample_pictures_are_in_the_installed_packages(tmp_path):
    pictures = demo_pictures.sample_pictures(tmp_path)
    assert len(pictures) >= 8
    assert [path.name for path in pictures[: len(demo_pictures.PHOTOGRAPHS)]] == list(demo_pictures.PHOTOGRAPHS)
    for path in pictures:
        with Image.open(path) as image:
            assert min(image.size) >= 256


def test_pictures_in_a_folder_are_sorted_and_other_files_left_out(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in demo_pictures.pictures_in(tmp_path)] == ["a.png", "b.JPG"]
