"""Run docker/Dockerfile without an engine, and click once through what it makes: `python scripts/check_images.py`.

Each target gets an empty folder and an empty virtual environment in place of its base image. What the file copies is
copied there (through .dockerignore), its variables are set and nothing else of this shell's, and its RUN lines of pip
are run as they stand. Then its CMD is started from there with the settings of docker-compose.yml, against a real Redis,
and must pass the health check that docker-compose.yml has for it. Takes minutes, 8 GB of disk and a package index.

Not seen this way: the base image itself, its users and folders, and the limits that compose puts on a container.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import yaml
from reliability.annotators import Pictures
from reliability.service import RedisServer, wait_for

from ml_backend import processes

ROOT = Path(__file__).resolve().parents[1]
SERVICES = {"ml_backend": "ml_backend", "worker": "worker-cpu"}
#: What of this shell a container of the same machine would have too: how packages and the network are reached.
KEPT = ("PIP_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT", "REQUESTS_CA", "http_proxy", "https_proxy")


@dataclass
class Target:
    """A stage of the Dockerfile with those that it is made from: its steps, its variables and its command."""

    steps: list[tuple[str, str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)


def read_dockerfile(text: str) -> dict[str, Target]:
    """Targets by name. Raises ValueError for an instruction that is not known here."""
    targets: dict[str, Target] = {}
    lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines()
    current = Target()
    for line in filter(None, map(str.strip, lines)):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            before = targets.get(parent, Target())
            current = targets[name] = Target([*before.steps], dict(before.environment))
        elif word == "ENV":
            current.environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word in ("RUN", "COPY"):
            current.steps.append((word, rest))
        elif word == "CMD":
            current.command = json.loads(rest)
        elif word not in ("USER", "VOLUME", "EXPOSE", "WORKDIR"):
            raise ValueError(f"{word} is not known here")
    return targets


def let_through(path: str) -> bool:
    """Whether .dockerignore lets a file into the build."""
    allowed = True
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = [path, *map(str, Path(path).parents)][:-1]
        if any(fnmatch.fnmatch(part, pattern) or fnmatch.fnmatch(Path(part).name, pattern) for part in parts):
            allowed = line.startswith("!")
    return allowed


def copy(sources: list[str], destination: Path) -> None:
    """A COPY instruction: files into the folder, the content of folders into a folder of that name."""
    for source in sources:
        files = [ROOT / source] if (ROOT / source).is_file() else sorted((ROOT / source).rglob("*"))
        for file in files:
            inside = file.relative_to(ROOT)
            if file.is_file() and let_through(str(inside)):
                target = destination / (file.name if file == ROOT / source else file.relative_to(ROOT / source))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def make(target: Target, folder: Path) -> dict[str, str]:
    """Carry out the steps in `folder`; returns the environment of its processes. Raises CalledProcessError."""
    app, tools = folder / "app", folder / "python"
    app.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", tools], check=True)
    environment = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    environment |= target.environment | {"PATH": f"{tools / 'bin'}:/usr/bin:/bin", "HOME": str(folder)}
    # Where the image has /data and /tmp, which are not to be touched on this machine.
    environment |= {"BALD_SAM_DATA_DIR": str(folder / "data"), "XDG_CACHE_HOME": str(folder / "cache")}
    for word, rest in target.steps:
        started = time.monotonic()
        if word == "COPY":
            *sources, to = rest.split()
            copy(sources, (app / to).resolve())
            continue
        if not rest.startswith("pip "):
            print(f"  left out: RUN {rest}")
            continue
        subprocess.run(rest, shell=True, cwd=app, env=environment, check=True, stdout=subprocess.DEVNULL)  # noqa: S602
        print(f"  RUN {rest}: {time.monotonic() - started:.0f} s", flush=True)
    return environment


def settings_of(service: Mapping[str, Any], redis_url: str) -> dict[str, str]:
    """The settings that docker-compose.yml gives a service where .env holds nothing but passwords."""
    found = {}
    for name, value in service["environment"].items():
        if value is None:
            continue  # only where .env has it
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))
        found[name] = re.sub(r"\$\{\w+:\?[^}]*\}", "a-password", text)
    return found | {"BALD_SAM_REDIS_URL": redis_url}


@contextmanager
def running(command: list[str], environment: Mapping[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process, until the block ends; what it wrote is shown if the block fails."""
    log = folder / "log"
    path = shutil.which(command[0], path=environment["PATH"])
    assert path, command[0]
    process = processes.start([path, *command[1:]], env=environment, cwd=folder, log=log)
    try:
        yield process
    except BaseException:
        print(log.read_text(errors="replace"), file=sys.stderr)
        raise
    finally:
        processes.stop(process)


def healthy(check: list[str], environment: Mapping[str, str], folder: Path) -> bool:
    """Whether a health check of docker-compose.yml passes."""
    path = shutil.which(check[1], path=environment["PATH"])
    assert check[0] == "CMD" and path
    done = subprocess.run([path, *check[2:]], env=environment, cwd=folder, capture_output=True, check=False)
    return done.returncode == 0


def main() -> None:
    """Exit status 1, or a traceback, if a step or a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    targets = read_dockerfile((ROOT / "docker/Dockerfile").read_text())
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        environments = {}
        for target in SERVICES:
            print(f"{target}:", flush=True)
            environments[target] = make(targets[target], base / target)
        server, port = RedisServer(base), processes.free_port()
        server.start()
        try:
            pictures = Pictures(base, 1, (60, 80))
            for target, service in SERVICES.items():
                environments[target] |= settings_of(compose[service], server.url)
            environments["worker"]["BALD_SAM_LOCAL_ROOTS"] = str(base)
            moved = [str(port) if part == "9090" else part for part in targets["ml_backend"].command]
            checks = {target: compose[service]["healthcheck"]["test"] for target, service in SERVICES.items()}
            checks["ml_backend"] = [part.replace("9090", str(port)) for part in checks["ml_backend"]]
            with (
                running(moved, environments["ml_backend"], base / "ml_backend"),
                running(targets["worker"].command, environments["worker"], base / "worker"),
            ):
                for target, check in checks.items():
                    wait_for(lambda c=check, t=target: healthy(c, environments[t], base / t))  # type: ignore[misc]
                    print(f"{target}: healthy", flush=True)
                answer = requests.post(
                    f"http://127.0.0.1:{port}/predict",
                    json=pictures.body(0, 1, "first", 1),
                    auth=(environments["ml_backend"]["BALD_SAM_BASIC_AUTH_USER"], "a-password"),
                    timeout=60,
                )
        finally:
            server.kill()
    print(f"a click: {answer.status_code}, {len(answer.content)} bytes")
    sys.exit(0 if answer.ok and '"brushlabels"' in answer.text else 1)


if __name__ == "__main__":
    main()
