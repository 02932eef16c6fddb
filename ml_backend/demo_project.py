"""The demo's project in Label Studio: which pictures are in it, and that the backend is connected to it."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ml_backend.connect import connect
from ml_backend.label_studio_api import LabelStudioApi
from ml_backend.labeling_config import recommended_config
from ml_backend.settings import Settings

EMAIL = "demo@example.com"
LABELS = ("Object", "Person", "Animal")
SAMPLES = "samples"


@dataclass
class State:
    """What the demo remembers between starts, in `demo.json`: the login and which pictures are in which project."""

    path: Path
    email: str = EMAIL
    password: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    token: str | None = None
    #: "samples" or the path of a picture folder -> {"id": project, "uploaded": [file names], "backend": address}
    projects: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> State:
        """The stored state, or a new one."""
        return cls(path=path, **json.loads(path.read_text())) if path.is_file() else cls(path=path)

    def save(self) -> None:
        """Write it so that only its owner reads it, and never half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {name: value for name, value in asdict(self).items() if name != "path"}
        draft = self.path.with_suffix(".tmp")
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(content, indent=1))
        draft.replace(self.path)


def fill(api: LabelStudioApi, state: State, key: str, images: Path | None, pictures: list[Path]) -> int:
    """The project of these pictures, made where it is missing, with every picture that it does not have yet."""
    known = state.projects.get(key)
    if known is None or not _exists(api, known["id"]):
        title = f"bald-sam: {images.resolve().name}" if images else "bald-sam: sample pictures"
        made = api.call("POST", "/api/projects", json={"title": title[:50], "label_config": recommended_config(LABELS)})
        known = state.projects[key] = {"id": made["id"], "uploaded": []}
        state.save()
    for picture in pictures:
        if picture.name not in known["uploaded"]:
            with picture.open("rb") as content:
                upload = {picture.name: (picture.name, content)}
                api.call("POST", f"/api/projects/{known['id']}/import", files=upload)
            known["uploaded"].append(picture.name)
            state.save()
    project: int = known["id"]
    return project


def _exists(api: LabelStudioApi, project: int) -> bool:
    return any(found["id"] == project for found in api.call("GET", "/api/projects?page_size=1000")["results"])


def attach(api: LabelStudioApi, state: State, key: str, url: str, settings: Settings) -> list[str]:
    """Make the backend the project's interactive one; of what is there, only our own former entry is removed.

    Returns what is still wrong, in sentences.
    """
    known = state.projects[key]
    former = known.get("backend")
    if former not in {None, url}:
        for backend in api.call("GET", f"/api/ml?project={known['id']}"):
            if backend["url"] == former:
                api.call("DELETE", f"/api/ml/{backend['id']}")
        for hook in api.call("GET", f"/api/webhooks/?project={known['id']}"):
            if hook["url"] == f"{former}/webhook":
                api.call("DELETE", f"/api/webhooks/{hook['id']}/")
    unprotected = settings.model_copy(update={"basic_auth_user": None, "basic_auth_pass": None, "token": None})
    steps = list(connect(api, known["id"], url, unprotected))
    known["backend"] = url
    state.save()
    return [step.text for step in steps if step.state == "wrong"]


def first_open(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """The first task that is not labelled yet, else the first."""
    return next((task for task in tasks if not task["is_labeled"]), tasks[0])
