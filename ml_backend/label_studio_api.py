"""The few calls of Label Studio's API that bald-sam needs, with either kind of its tokens."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from ml_backend.errors import BackendError
from ml_backend.settings import Settings

#: Access tokens live 300 s.
REFRESH_S = 240.0
PAGE = 100
#: Requests that may be under way at once; more wait for a free connection.
CONNECTIONS = 16
#: A Label Studio that restarts, or answers nothing for a moment, is asked again after these seconds.
RETRY_AFTER_S = (0.5, 2.0, 5.0)


class LabelStudioError(Exception):
    """Label Studio could not be installed, started or used; the message says what to do. `status`: HTTP, or None."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class LabelStudioApi:
    """Authorised calls; may be used from many threads. A personal access token is exchanged for access tokens, a
    legacy token is sent as it is."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self._token = token
        self._session = requests.Session()
        self._session.trust_env = False
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=CONNECTIONS, pool_block=True))
        self._expires = 0.0
        self._lock = threading.Lock()

    def call(self, method: str, path: str, **kwargs: Any) -> Any:
        """One request and its JSON answer (None where it is empty). Raises LabelStudioError with what it said.

        Reading is tried again when the connection breaks or the answer is 502 to 504; writing is not, for Label Studio
        may have done it: whoever writes asks first what is there.
        """
        waits = RETRY_AFTER_S if method == "GET" else ()
        for wait in (*waits, None):
            try:
                answer = self._request(method, path, **kwargs)
            except (requests.ConnectionError, requests.Timeout):
                if wait is None:
                    raise
            else:
                if answer.ok:
                    return answer.json() if answer.content else None
                if wait is None or answer.status_code not in (502, 503, 504):
                    said = f"Label Studio answered {answer.status_code} to {method} {path}: {_reason(answer)}"
                    raise LabelStudioError(said, answer.status_code)
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def project(self, project: int) -> dict[str, Any]:
        """A project, its `label_config` and `model_version` among the rest."""
        found: dict[str, Any] = self.call("GET", f"/api/projects/{project}/")
        return found

    def tasks(
        self,
        project: int,
        *,
        regions: bool = True,
        view: int | None = None,
        filters: Sequence[Mapping[str, Any]] = (),
        ordering: str | None = None,
        limit: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Tasks of a project in the order of their ids, or of a Data Manager tab (`view`, its filters included).

        `regions`: with annotations, drafts and predictions, else without, which is much less to send. `filters`: Data
        Manager filters that must all hold, see `where`; `ordering`: one of its columns, `-` before it to reverse. Pages
        are fetched as they are needed.
        """
        params: dict[str, Any] = {"project": project, "page_size": min(PAGE, limit or PAGE)}
        if view is not None:
            params["view"] = view
        if regions:
            params["fields"] = "all"
        query: dict[str, Any] = {}
        if filters:
            query["filters"] = {"conjunction": "and", "items": list(filters)}
        if ordering:
            query["ordering"] = [ordering]
        if query:
            params["query"] = json.dumps(query)
        page, seen, total = 1, 0, None
        while (total is None or seen < total) and (limit is None or seen < limit):
            body = self.call("GET", "/api/tasks", params=params | {"page": page})
            total = body["total"]
            if not body["tasks"]:
                return
            for task in body["tasks"]:
                if limit is not None and seen >= limit:
                    return
                seen += 1
                yield task
            page += 1

    def task(self, task: int) -> dict[str, Any] | None:
        """One task with its annotations and predictions; None if it was deleted."""
        try:
            found: dict[str, Any] = self.call("GET", f"/api/tasks/{task}/")
        except LabelStudioError as error:
            if error.status == 404:
                return None
            raise
        return found

    def predictions(self, task: int) -> list[dict[str, Any]]:
        """All predictions of a task, oldest first."""
        found = self.call("GET", "/api/predictions/", params={"task": task})
        return sorted(found, key=lambda prediction: prediction["id"])

    def create_prediction(
        self, task: int, result: Sequence[Mapping[str, Any]], *, score: float | None, model_version: str
    ) -> int:
        """Add a prediction and return its id. It does not look whether the task has one of this version."""
        body = {"task": task, "result": list(result), "score": score, "model_version": model_version}
        return int(self.call("POST", "/api/predictions/", json=body)["id"])

    def create_predictions(self, project: int, predictions: Sequence[Mapping[str, Any]]) -> int:
        """Add predictions (`task`, `result`, `score`, `model_version` each) in one request; how many were made.

        Fewer than given: Label Studio refused some and does not say which. It looks for no duplicates.
        """
        made = self.call("POST", f"/api/projects/{project}/import/predictions", json=list(predictions))
        return int(made["created"])

    def delete_prediction(self, prediction: int) -> None:
        """Delete a prediction; harmless if it is gone already."""
        try:
            self.call("DELETE", f"/api/predictions/{prediction}/")
        except LabelStudioError as error:
            if error.status != 404:
                raise

    def model_versions(self, project: int) -> dict[str, int]:
        """How many predictions of each model version a project has."""
        found = self.call("GET", f"/api/projects/{project}/model-versions/", params={"extended": "true"})
        return {one["model_version"]: one["count"] for one in found["static"]}

    def _request(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        kwargs.setdefault("timeout", 120)
        answer = self._session.request(method, f"{self.url}{path}", headers=self._authorization(), **kwargs)
        if answer.status_code == requests.codes.unauthorized and self._is_personal:
            self._expires = 0.0  # it was restarted with another secret, or its clock jumped
            answer = self._session.request(method, f"{self.url}{path}", headers=self._authorization(), **kwargs)
        return answer

    @property
    def _is_personal(self) -> bool:
        return self._token.count(".") == 2

    def _authorization(self) -> dict[str, str]:
        if not self._is_personal:
            return {"Authorization": f"Token {self._token}"}
        with self._lock:
            if time.monotonic() > self._expires:
                answer = self._session.post(f"{self.url}/api/token/refresh", json={"refresh": self._token}, timeout=30)
                if not answer.ok:
                    raise LabelStudioError(
                        "Label Studio does not accept the personal access token. Make one under Account & Settings > "
                        "Personal Access Token and set LABEL_STUDIO_API_KEY to it.",
                        answer.status_code,
                    )
                self._access = answer.json()["access"]
                self._expires = time.monotonic() + REFRESH_S
            return {"Authorization": f"Bearer {self._access}"}


def where(field: str, operator: str, value: Any, kind: str = "Number") -> dict[str, Any]:
    """One filter of the Data Manager, for example `where("id", "greater", 7)`."""
    return {"filter": f"filter:tasks:{field}", "operator": operator, "type": kind, "value": value}


def api_from(settings: Settings) -> LabelStudioApi:
    """The API of the Label Studio in the settings. Raises BackendError when its address or key is not set."""
    if not settings.label_studio_url or not settings.label_studio_api_key:
        raise BackendError(
            "The address or the key of Label Studio is not set.",
            "Set LABEL_STUDIO_URL, and LABEL_STUDIO_API_KEY to the personal access token under Account & Settings.",
        )
    return LabelStudioApi(settings.label_studio_url.rstrip("/"), settings.label_studio_api_key.get_secret_value())


def _reason(answer: requests.Response) -> str:
    """What an error answer says, without the wrapping: its validation errors, else its detail, else its text."""
    try:
        body = answer.json()
        errors = body.get("validation_errors") or {}
        return " ".join(text for texts in errors.values() for text in texts) or str(body["detail"])
    except (ValueError, AttributeError, KeyError, TypeError):
        return answer.text[:300]
