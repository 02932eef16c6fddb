"""Who made an object: one name for a person that Label Studio calls by e-mail in drafts and by number in webhooks."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from sqlalchemy import Connection, select

from ml_backend.clicks.schema import objects

KEY_FILE = "clicks.key"


def read_key(data_dir: Path) -> bytes:
    """The secret of this installation's pseudonyms, made on first use (mode 0600).

    Who has the key can find out who is who; without it, pseudonyms of two installations cannot be joined.
    """
    path = data_dir / KEY_FILE
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return bytes.fromhex(path.read_text())
    with os.fdopen(file, "w") as text:
        text.write(secrets.token_hex(32))
    return bytes.fromhex(path.read_text())


class People:
    """Names of users: real ones, or pseudonyms made with `key` (HMAC-SHA-256)."""

    def __init__(self, connection: Connection, key: bytes | None) -> None:
        both = select(objects.c.user_email, objects.c.user_id).where(
            objects.c.user_email.is_not(None), objects.c.user_id.is_not(None)
        )
        self._ids: dict[str, int] = {}
        self._emails: dict[int, str] = {}
        for email, user_id in connection.execute(both.distinct()):
            self._ids[email] = user_id
            self._emails[user_id] = email
        self._key = key
        self._names: dict[tuple[str | None, int | None], str | None] = {}

    def name(self, email: str | None, user_id: int | None) -> str | None:
        """One name for one person; None where nobody is known."""
        known = (email, user_id)
        if known not in self._names:
            self._names[known] = self._name(email, user_id)
        return self._names[known]

    def _name(self, email: str | None, user_id: int | None) -> str | None:
        if user_id is None and email is not None:
            user_id = self._ids.get(email)
        if user_id is not None:
            email = self._emails.get(user_id)
        if user_id is None and email is None:
            return None
        if self._key is None:
            return email or str(user_id)
        person = f"id {user_id}" if user_id is not None else f"email {email}"
        return "u-" + hmac.new(self._key, person.encode(), hashlib.sha256).hexdigest()[:12]
