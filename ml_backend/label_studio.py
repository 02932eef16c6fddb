"""A Label Studio of our own: its environment and its process. The demo and the end-to-end test start it.

Label Studio pins its own redis, rq and much else, so it never shares an environment with bald-sam.
`python -m ml_backend.label_studio DIR` makes that environment in DIR and prints the path of its command.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import requests

from ml_backend import processes
from ml_backend.label_studio_api import LabelStudioError

VERSION = "1.23.2"
LOCK = Path(__file__).with_name("requirements-label-studio.lock")

#: Migrations of the first start take about a minute on two quiet cores; a busy machine gets ten.
START_LIMIT_S = 600.0

#: A default Label Studio refuses an ML backend on the same machine or network, and calls home.
SETTINGS = {
    "USE_DEFAULT_BANNED_SUBNETS": "false",
    "COLLECT_ANALYTICS": "false",
    "LATEST_VERSION_CHECK": "false",
    "SENTRY_DSN": "",
    "FRONTEND_SENTRY_DSN": "",
    "DJANGO_DB": "sqlite",
    "PYTHONUNBUFFERED": "1",
}

Say = Callable[[str], None]


# --- environment ------------------------------------------------------------------------------------------------------


def command_of(environment: Path) -> Path:
    """The `label-studio` command of a virtual environment."""
    return environment / "bin" / "label-studio"


def ensure_environment(environment: Path, say: Say = lambda _: None) -> Path:
    """Make the virtual environment of Label Studio where it is missing or old; return its `label-studio` command.

    A stamp holds the hash of the pinned requirements, so that a second call costs nothing; a folder without one is
    not ours and is never changed, but used when it has the right version. pip runs with the user's own configuration.
    Raises LabelStudioError that says what to do.
    """
    stamp = environment / ".requirements-sha256"
    wanted = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    ours = stamp.is_file() or not environment.exists() or not any(environment.iterdir())
    if not ours and _version_in(environment) != VERSION:
        raise LabelStudioError(
            f"{environment} is not an environment with Label Studio {VERSION}, and bald-sam did not make it. "
            "Set BALD_SAM_LABEL_STUDIO_ENV to a folder that does not exist yet."
        )
    if ours and (not stamp.is_file() or stamp.read_text() != wanted or not command_of(environment).is_file()):
        say(f"Installing Label Studio {VERSION} in its own environment (about two minutes, once)")
        environment.mkdir(parents=True, exist_ok=True)
        stamp.write_text("not finished")
        _run([sys.executable, "-m", "venv", str(environment)])
        python = str(environment / "bin" / "python")
        _run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "-r", str(LOCK)])
        stamp.write_text(wanted)
    return command_of(environment)


def _version_in(environment: Path) -> str | None:
    script = "import importlib.metadata as m; print(m.version('label-studio'))"
    try:
        done = subprocess.run(  # noqa: S603
            [str(environment / "bin" / "python"), "-c", script], check=False, capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        tail = " / ".join(errors[-3:]) or f"exit status {done.returncode}"
        raise LabelStudioError(f"Label Studio could not be installed: {tail}. Try again with a working package index.")


# --- process ----------------------------------------------------------------------------------------------------------


class LabelStudioServer:
    """One running Label Studio with its data in `data_dir`. Its own sqlite, uploads, settings and log are there.

    `email` and `password` make the first user; they travel in the environment, not in the process list.
    """

    def __init__(self, command: Path, *, data_dir: Path, port: int, email: str, password: str) -> None:
        self.command = command
        self.data_dir = data_dir
        self.port = port
        self.email = email
        self.password = password
        self.url = f"http://127.0.0.1:{port}"
        self.log = data_dir / "label-studio.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_new(self) -> bool:
        """Whether the first start, with its migrations, is still to come."""
        return not (self.data_dir / "label_studio.sqlite3").exists()

    def start(self) -> None:
        """Start, and return when Label Studio answers. Raises LabelStudioError, with the log's end, if it does not."""
        if not processes.port_is_free(self.port):
            raise LabelStudioError(f"Port {self.port} is taken.")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._process = processes.start(
            [self.command, "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(self.port)],
            env=self._environment(),
            cwd=self.data_dir,
            log=self.log,
        )
        deadline = time.monotonic() + START_LIMIT_S
        while not self._answers():
            if not self.runs():
                raise LabelStudioError(
                    f"Label Studio stopped while starting: {processes.last_words(self.log)} (log: {self.log})"
                )
            if time.monotonic() > deadline:
                self.stop()
                raise LabelStudioError(f"Label Studio did not start in {START_LIMIT_S:.0f} s (log: {self.log})")
            time.sleep(0.3)

    def runs(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Stop it and its children; harmless when it is stopped already."""
        if self._process is not None:
            processes.stop(self._process)

    def __enter__(self) -> LabelStudioServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _environment(self) -> dict[str, str]:
        # Settings of another Label Studio, and of this Python environment, must not leak into this one.
        foreign = ("LABEL_STUDIO_", "DJANGO_", "POSTGRE_", "PYTHONPATH", "VIRTUAL_ENV", "BALD_SAM_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return (
            kept
            | SETTINGS
            | {
                "LABEL_STUDIO_BASE_DATA_DIR": str(self.data_dir),
                "LABEL_STUDIO_USERNAME": self.email,
                "LABEL_STUDIO_PASSWORD": self.password,
                "XDG_CONFIG_HOME": str(self.data_dir / "config"),
            }
        )

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=2).ok
        except requests.RequestException:
            return False


# --- token ------------------------------------------------------------------------------------------------------------


def personal_access_token(url: str, email: str, password: str) -> str:
    """Log in as the page does and return the user's personal access token, made where there is none.

    The token is what `LABEL_STUDIO_API_KEY` wants: the legacy token is switched off in a default Label Studio.
    """
    session = requests.Session()
    session.trust_env = False
    session.get(f"{url}/user/login", timeout=30).raise_for_status()
    form = {"email": email, "password": password, "csrfmiddlewaretoken": session.cookies.get("csrftoken", "")}
    session.post(f"{url}/user/login", data=form, headers={"Referer": url}, timeout=30).raise_for_status()
    headers = {"X-CSRFToken": session.cookies.get("csrftoken", ""), "Referer": url}
    answer = session.post(f"{url}/api/token/", headers=headers, timeout=30)
    if answer.status_code == requests.codes.unauthorized:
        raise LabelStudioError(f"Label Studio does not accept the password of {email}.")
    if answer.status_code == requests.codes.conflict:
        raise LabelStudioError(
            f"{email} has a personal access token already, and Label Studio shows it only once: "
            "delete it there under Account & Settings, or begin anew with `bald-sam demo --reset`."
        )
    answer.raise_for_status()
    token: str = answer.json()["token"]
    return token


def checkout() -> Path | None:
    """The folder of a source checkout that this package runs from, None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def default_environment(data_dir: Path) -> Path:
    """Where Label Studio's environment is: `BALD_SAM_LABEL_STUDIO_ENV`, else in the checkout, else in `data_dir`."""
    if chosen := os.environ.get("BALD_SAM_LABEL_STUDIO_ENV"):
        return Path(chosen).expanduser()
    root = checkout()
    return root / ".venv-label-studio" if root else data_dir / f"label-studio-{VERSION}"


def main() -> None:
    """`python -m ml_backend.label_studio DIR`."""
    environment = Path(sys.argv[1]) if len(sys.argv) > 1 else default_environment(Path.cwd())
    try:
        command = ensure_environment(environment, lambda text: print(text, file=sys.stderr))  # noqa: T201
    except LabelStudioError as error:
        sys.exit(str(error))
    print(command)  # noqa: T201


if __name__ == "__main__":
    main()
