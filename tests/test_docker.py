"""The compose file and the Dockerfile, as far as they can be checked without an engine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from ml_backend.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def setting_names() -> set[str]:
    return {f"BALD_SAM_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_bald_sam_variable_is_a_setting(name: str) -> None:
    variables = {key for key in SERVICES[name].get("environment", {}) if key.startswith("BALD_SAM_")}
    assert variables <= setting_names()


def test_every_variable_in_the_example_is_used() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for line in (ROOT / "docker/env.example").read_text().splitlines():
        if line and not line.startswith("#"):
            assert "${" + line.split("=")[0] in text, line


def test_every_required_variable_is_in_the_example() -> None:
    example = (ROOT / "docker/env.example").read_text()
    for name in re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yml").read_text()):
        assert f"\n{name}=" in example, name


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_images_are_pinned_and_targets_exist(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":\d+\.\d+", service["image"]), "an image without a version changes under the user's feet"
    if build := service.get("build"):
        assert (ROOT / build["dockerfile"]).is_file()
        assert f" AS {build['target']}\n" in DOCKERFILE


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_services_come_back_and_gain_no_privileges(name: str) -> None:
    assert SERVICES[name]["restart"] == "unless-stopped"
    assert "no-new-privileges:true" in SERVICES[name]["security_opt"]
    for port in SERVICES[name].get("ports", []):
        assert port.startswith("127.0.0.1:"), "nothing is published beyond this machine by default"


def test_dockerfile_copies_only_what_exists_and_is_let_through() -> None:
    let_through = (ROOT / ".dockerignore").read_text()
    for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.M):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in let_through or source.endswith(".lock"), source


def test_images_run_without_root() -> None:
    assert DOCKERFILE.count("USER bald-sam") == 2


@pytest.mark.parametrize(("lock", "torch"), [("ml_backend", False), ("worker", True)])
def test_locks_pin_everything_and_the_web_image_has_no_torch(lock: str, torch: bool) -> None:
    whole = set((ROOT / "requirements.lock").read_text().splitlines())
    lines = (ROOT / f"docker/{lock}.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.\-]+==\S+( ; .+)?", line) for line in lines)
    assert any(line.startswith("torch==") for line in lines) is torch
    assert set(lines) <= whole, "the images run the versions that the tests ran"


def test_image_tags_carry_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in ("ml_backend", "worker-cpu", "worker-gpu"):
        assert SERVICES[name]["image"].endswith(f":{version}")
