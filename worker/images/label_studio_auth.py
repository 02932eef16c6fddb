"""The Authorization header for Label Studio, from either kind of its tokens.

A personal access token is a JWT that is only good for making access tokens, which live 300 s and go into `Bearer`;
a legacy token is 40 hexadecimal digits and goes into `Token` as it is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

#: Access tokens are renewed this long before they end, seconds.
EARLY_S = 30.0

_lock = threading.Lock()
_access: dict[tuple[str, str], tuple[str, float]] = {}


def claims(token: str) -> dict[str, Any] | None:
    """Payload of a JWT, unverified; None when the token is no JWT."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        payload = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except ValueError:
        return None
    return payload if isinstance(payload, dict) else None


def authorization(base_url: str, api_key: str, refresh: Callable[[str], str], *, renew: bool = False) -> str:
    """Value of the Authorization header for the Label Studio at `base_url`.

    `refresh(personal access token)` asks that Label Studio for an access token; its answer is kept until shortly
    before it ends, or until `renew`.
    """
    payload = claims(api_key)
    if payload is None:
        return f"Token {api_key}"
    if payload.get("token_type") == "access":
        return f"Bearer {api_key}"
    key = (base_url, hashlib.sha256(api_key.encode()).hexdigest())
    with _lock:
        access, ends = _access.get(key, ("", 0.0))
        if renew or time.monotonic() >= ends:
            access = refresh(api_key)
            fresh = claims(access) or {}
            try:
                # The difference, not the date: the clocks of two machines may disagree.
                lifetime = float(fresh["exp"]) - float(fresh["iat"])
            except (KeyError, TypeError, ValueError):
                lifetime = 300.0
            _access[key] = (access, time.monotonic() + max(0.0, lifetime - EARLY_S))
        return f"Bearer {access}"
