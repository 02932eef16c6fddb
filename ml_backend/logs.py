"""The log of a process: a line an event, for people or as JSON, with ids of request, session and job, no secrets."""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from ml_backend.settings import Settings

_ids: ContextVar[Mapping[str, str]] = ContextVar("ids", default=MappingProxyType({}))

#: Shorter ones would be found in every word.
SHORTEST_SECRET = 4
HIDDEN = "***"
#: Whatever it is the secret of: what an Authorization header holds, a signature in a URL, a password before a host.
_CREDENTIALS = re.compile(
    r"(?i)((?:\bbearer|\bbasic|\btoken) +)[\w.~+/=-]{8,}"
    r"|([?&](?:[\w-]*(?:signature|token|credential|password|api_?key)|sig)=)[^&\s\"']+"
    r"|(\b[a-z][a-z0-9+.-]*://[^\s/:@]*:)[^\s/@]+(?=@)"
)
#: Line ends and other controls could forge a line.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def bind(*, fresh: bool = False, **ids: str | None) -> None:
    """Put ids (`request`, `session`, `job`) into every line that this thread logs; `fresh` forgets those of before."""
    _ids.set({**({} if fresh else _ids.get()), **{name: value for name, value in ids.items() if value is not None}})


def configure(settings: Settings, more_ids: Callable[[], Mapping[str, str]] = dict) -> None:
    """Log to stderr as the settings say. `more_ids` knows ids of the line's thread that were not bound."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(settings.log_format == "json", secrets_of(settings), more_ids))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())


def secrets_of(settings: Settings) -> set[str]:
    """Every secret of the settings, passwords in URLs and Basic credentials included."""
    found: set[str] = set()
    for value in (getattr(settings, name) for name in Settings.model_fields):
        if isinstance(value, SecretStr):
            secret = value.get_secret_value()
            password = urlsplit(secret).password if "://" in secret else None
            found |= {password, unquote(password)} if password else {secret} if "://" not in secret else set()
    if settings.basic_auth_user and settings.basic_auth_pass:
        pair = f"{settings.basic_auth_user}:{settings.basic_auth_pass.get_secret_value()}"
        found.add(base64.b64encode(pair.encode()).decode())
    return {secret for secret in found if len(secret) >= SHORTEST_SECRET}


class Formatter(logging.Formatter):
    """One line for each record (an exception's lines follow it), or one JSON object."""

    def __init__(
        self, as_json: bool, secrets: Iterable[str] = (), more_ids: Callable[[], Mapping[str, str]] = dict
    ) -> None:
        super().__init__()
        self._json, self._more_ids = as_json, more_ids
        self._secrets = sorted(secrets, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        """The record without secrets and without controls that would look like another record."""
        ids = {**self._more_ids(), **_ids.get()}
        message = self._safe(record.getMessage())
        trace = self._safe(self.formatException(record.exc_info), lines=True) if record.exc_info else ""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if self._json:
            said = {"time": time, "level": record.levelname, "logger": record.name, "message": message, **ids}
            return json.dumps(said | ({"exception": trace} if trace else {}), ensure_ascii=False)
        shown = "".join(f" {name}={value}" for name, value in ids.items())
        return f"{time} {record.levelname} {record.name} {message}{shown}" + (f"\n{trace}" if trace else "")

    def _safe(self, text: str, *, lines: bool = False) -> str:
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        text = _CREDENTIALS.sub(lambda found: f"{next(filter(None, found.groups()))}{HIDDEN}", text)
        parts = text.split("\n") if lines else [text]
        return "\n".join(part.translate(_CONTROLS) for part in parts)
