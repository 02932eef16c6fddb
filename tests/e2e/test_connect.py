"""`bald-sam connect` against a real Label Studio: what is missing is made, what is wrong is said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ml_backend import processes
from ml_backend.app import create_app
from ml_backend.connect import Step, connect
from ml_backend.label_studio_api import LabelStudioError
from ml_backend.settings import Settings

pytestmark = pytest.mark.e2e

UNUSABLE = """<View>
  <Image name="image" value="$image"/>
  <Choices name="c" toName="image"><Choice value="a"/></Choices>
</View>"""


class Idle:
    """A runner without work: connecting asks for health and set-up only."""

    def status(self) -> dict[str, object]:
        return {"runner": "in-process", "workers": []}


@pytest.fixture
def settings() -> Settings:
    return Settings(basic_auth_user="label-studio", basic_auth_pass="a password")


@pytest.fixture
def backend(settings: Settings) -> Iterator[str]:
    """The real web application behind Basic authentication, on a free port."""
    import threading

    import waitress

    server = waitress.create_server(create_app(settings, Idle()), host="127.0.0.1", port=processes.free_port())
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.effective_port}"
    server.close()


@pytest.fixture
def project(studio: Any) -> int:
    body = studio.api.call("POST", "/api/projects/", json={"title": "connect", "label_config": UNUSABLE})
    return int(body["id"])


def states(steps: Iterator[Step]) -> list[str]:
    return [step.state for step in steps]


def test_a_bare_project_is_connected_and_a_second_time_finds_it_right(
    studio: Any, backend: str, project: int, settings: Settings
) -> None:
    first = states(connect(studio.api, project, backend, settings, labels=["Cell", "Nucleus"]))
    assert first == ["mended", "mended", "mended"]

    entries = studio.api.call("GET", f"/api/ml?project={project}")
    assert [(entry["url"], entry["is_interactive"], entry["state"]) for entry in entries] == [(backend, True, "CO")]
    hooks = studio.api.call("GET", f"/api/webhooks/?project={project}")
    assert [hook["url"] for hook in hooks] == [f"{backend}/webhook"]
    assert hooks[0]["headers"]["Authorization"].startswith("Basic ")

    # The entry's password cannot be read back, so it is written again; the rest is left alone.
    assert states(connect(studio.api, project, backend, settings)) == ["right", "mended", "right"]
    assert len(studio.api.call("GET", f"/api/ml?project={project}")) == 1


def test_an_unusable_config_is_told_and_left_alone_without_labels(
    studio: Any, backend: str, project: int, settings: Settings
) -> None:
    step = next(connect(studio.api, project, backend, settings))
    assert step.state == "wrong"
    assert "BrushLabels" in step.text
    assert "Choices" in studio.api.call("GET", f"/api/projects/{project}/")["label_config"]


def test_wrong_credentials_are_told(studio: Any, backend: str, project: int) -> None:
    wrong = Settings(basic_auth_user="label-studio", basic_auth_pass="another password")
    steps = connect(studio.api, project, backend, wrong, labels=["Cell"])
    next(steps)
    with pytest.raises(LabelStudioError, match="Credentials are missing or wrong"):
        next(steps)
