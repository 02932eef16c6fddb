"""The systemd units, as far as they can be checked where systemd does not run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from ml_backend.cli import main
from ml_backend.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs/systemd"
UNITS = sorted(FOLDER.glob("*.service"))
EXAMPLE = FOLDER / "bald-sam.env"
NAMES = {f"BALD_SAM_{name.upper()}" for name in Settings.model_fields} | {"LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"}
OTHERS = {"PYTHONUNBUFFERED", "XDG_CACHE_HOME", "MPLCONFIGDIR"}


def lines(path: Path, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", path.read_text(), re.M)


def test_every_variable_is_a_setting() -> None:
    assert set(re.findall(r"^(\w+)=", EXAMPLE.read_text(), re.M)) <= NAMES
    for unit in UNITS:
        given = {pair.partition("=")[0] for line in lines(unit, "Environment") for pair in shlex.split(line)}
        assert given <= NAMES | OTHERS
        assert lines(unit, "EnvironmentFile") == ["/etc/bald-sam.env"]


def test_the_example_makes_settings() -> None:
    values = dict(line.split("=", 1) for line in EXAMPLE.read_text().splitlines() if re.match(r"\w", line))
    fields = {name.removeprefix("BALD_SAM_").lower(): value for name, value in values.items()}
    settings = Settings(_env_file=None, **fields)
    assert settings.redis_url is not None
    assert set(fields) <= set(Settings.model_fields)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_the_command_exists_with_its_options(unit: Path) -> None:
    program, name, *options = shlex.split(lines(unit, "ExecStart")[0])
    assert Path(program).name == "bald-sam"
    command = main.get_command(click.Context(main), name)
    assert command is not None
    command.make_context(name, options)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_come_back_and_gain_no_privileges(unit: Path) -> None:
    assert lines(unit, "Restart") == ["always"]
    assert lines(unit, "User") == ["bald-sam"]
    assert lines(unit, "NoNewPrivileges") == ["yes"]
    assert lines(unit, "ProtectSystem") == ["strict"]
    assert lines(unit, "StateDirectory") == ["bald-sam"]


def test_a_worker_has_the_time_to_finish_its_click() -> None:
    """As long as in docker-compose.yml, and longer than Label Studio waits."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    grace = compose["services"]["worker-cpu"]["stop_grace_period"]
    assert lines(FOLDER / "bald-sam-worker@.service", "TimeoutStopSec") == [grace.removesuffix("s")]


def test_the_page_installs_as_the_images_do() -> None:
    """The steps that `scripts/check_images.py` carries out."""
    page, dockerfile = ((ROOT / name).read_text() for name in ("docs/operations.md", "docker/Dockerfile"))
    steps = set(re.findall(r"^RUN pip install (.+)$", dockerfile, re.M))
    assert len(steps) == 4
    for step in steps - {"--no-deps -r ml_backend.lock"}:
        assert f"venv/bin/pip install {step.replace('-r ', '-r docker/')}" in page
    for unit in UNITS:
        assert unit.parent.relative_to(ROOT).as_posix() + "/*.service" in page


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_finds_nothing_wrong(unit: Path, tmp_path: Path) -> None:
    """With another program in place of the one that is not installed there."""
    text = unit.read_text().replace("/opt/bald-sam/venv/bin/bald-sam", sys.executable)
    (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / unit.name)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.replace(str(tmp_path), "")) == (0, "")
