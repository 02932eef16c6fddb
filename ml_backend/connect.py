"""Connect a Label Studio project to a running backend, and say in words what was wrong.

Four things must be right before a click is answered and a submit is heard of: the project's labelling config, the
backend's entry in the project (interactive, with credentials), and the webhook, which Label Studio makes by itself but
without the credentials, and not at all when its own address rules refused it half way.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ml_backend import labeling_config
from ml_backend.errors import ConfigError
from ml_backend.label_studio_api import LabelStudioApi, LabelStudioError
from ml_backend.settings import Settings

TITLE = "bald-sam"


@dataclass(frozen=True)
class Step:
    """One thing that was checked: `state` is `right`, `mended` or `wrong`; `text` says it in words."""

    state: str
    text: str


def connect(
    api: LabelStudioApi, project: int, url: str, settings: Settings, *, labels: list[str] | None = None
) -> Iterator[Step]:
    """Check and mend the connection of `project` to the backend at `url`; yields what was found, in order.

    `labels`: put the recommended config with these labels into the project where its own cannot be used.
    Raises LabelStudioError when Label Studio refuses a call; the message carries what it said.
    """
    yield _config(api, project, labels)
    yield _backend(api, project, url, settings)
    yield _webhook(api, project, url, settings)


def _config(api: LabelStudioApi, project: int, labels: list[str] | None) -> Step:
    xml = api.call("GET", f"/api/projects/{project}/")["label_config"]
    try:
        config = labeling_config.parse(xml)
    except ConfigError as error:
        if not labels:
            return Step("wrong", f"The labelling config: {error} Or give --labels A,B to have it replaced.")
        wanted = labeling_config.recommended_config(labels)
        api.call("PATCH", f"/api/projects/{project}/", json={"label_config": wanted})
        return Step("mended", f"The labelling config is the recommended one now, with the labels {', '.join(labels)}.")
    if config.warnings:
        return Step("wrong", "The labelling config can be used, but: " + " ".join(config.warnings))
    return Step("right", "The labelling config has a mask, prompts and a place for the proposal.")


def _backend(api: LabelStudioApi, project: int, url: str, settings: Settings) -> Step:
    wanted: dict[str, Any] = {"url": url, "title": TITLE, "is_interactive": True, "project": project}
    if settings.basic_auth_user and settings.basic_auth_pass:
        wanted |= {
            "auth_method": "BASIC_AUTH",
            "basic_auth_user": settings.basic_auth_user,
            "basic_auth_pass": settings.basic_auth_pass.get_secret_value(),
        }
    others = []
    for backend in api.call("GET", f"/api/ml?project={project}"):
        if backend["url"].rstrip("/") != url:
            others.append(backend["url"])
            continue
        # The stored password cannot be read back, so an entry with credentials is always written again.
        if backend["is_interactive"] and not settings.basic_auth_user and backend["state"] == "CO":
            return _with_rivals(Step("right", f"The project uses {url} interactively."), others)
        api.call("PATCH", f"/api/ml/{backend['id']}", json=wanted)
        return _with_rivals(
            Step("mended", f"The entry of {url} in the project is interactive and up to date now."), others
        )
    try:
        api.call("POST", "/api/ml", json=wanted)
    except LabelStudioError as error:
        raise LabelStudioError(_explained(str(error), url)) from error
    return _with_rivals(Step("mended", f"The project uses {url} interactively now."), others)


def _with_rivals(step: Step, others: list[str]) -> Step:
    """Label Studio sends smart clicks to the first interactive backend alone."""
    if not others:
        return step
    return Step("wrong", f"{step.text} But it has other backends too ({', '.join(others)}); remove those not needed.")


def _explained(said: str, url: str) -> str:
    if "reserved network address" in said or "SSRF" in said:
        return (
            f"Label Studio refuses {url} because it is a private address. Start Label Studio with "
            "USE_DEFAULT_BANNED_SUBNETS=false (or with ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false both)."
        )
    return said


def _webhook(api: LabelStudioApi, project: int, url: str, settings: Settings) -> Step:
    address = f"{url}/webhook"
    headers = _credentials(settings)
    wanted = {"url": address, "send_payload": True, "send_for_all_actions": True, "is_active": True, "headers": headers}
    for hook in api.call("GET", f"/api/webhooks/?project={project}"):
        if hook["url"] != address:
            continue
        if all(hook.get(name) == value for name, value in wanted.items()):
            return Step("right", f"Events of the project are sent to {address}.")
        api.call("PATCH", f"/api/webhooks/{hook['id']}/", json=wanted)
        return Step("mended", f"Events of the project are sent to {address} with the right credentials now.")
    api.call("POST", "/api/webhooks/", json=wanted | {"project": project})
    return Step("mended", f"Events of the project are sent to {address} now; there was no webhook.")


def _credentials(settings: Settings) -> dict[str, str]:
    if settings.basic_auth_user and settings.basic_auth_pass:
        pair = f"{settings.basic_auth_user}:{settings.basic_auth_pass.get_secret_value()}"
        return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}
    if settings.token:
        return {"Authorization": f"Bearer {settings.token.get_secret_value()}"}
    return {}
