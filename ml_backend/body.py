"""Reading request bodies: JSON, without spending time on the masks that travel along."""

from __future__ import annotations

import json
import re
from typing import Any

from ml_backend.errors import RequestError

_KEY = b'"rle"'
_NUMBERS = b"0123456789,-. \t\r\n"
#: Half of a surrogate pair, which JSON can spell and nothing else can hold: neither a file, nor Redis, nor a hash.
_HALF = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


def without_masks(body: bytes) -> bytes:
    """Empty every `"rle": [numbers]` of a JSON text; the rest stays byte for byte.

    Each /predict carries all drafts, annotations and predictions of the task with their masks, and parsing these
    numbers would cost more than everything else in the request. Nothing reads them.
    """
    parts = []
    copied = at = 0
    while (key := body.find(_KEY, at)) >= 0:
        at = key + len(_KEY)
        start = body.find(b"[", at, at + 8)
        # Inside a JSON string the quotes of `"rle"` are escaped.
        if start < 0 or body[at:start].strip() != b":" or body[key - 1 : key] == b"\\":
            continue
        end = body.find(b"]", start)
        if end < 0:
            break
        if body[start + 1 : end].translate(None, _NUMBERS) == b"":
            parts.append(body[copied : start + 1])
            copied = at = end
    parts.append(body[copied:])
    return b"".join(parts)


def read_json(body: bytes) -> dict[str, Any]:
    """The object in `body`; half a character in it becomes U+FFFD. Raises RequestError (400) if it is none."""
    try:
        value = json.loads(_HALF.sub(rb"\\ufffd", body).decode())
    except (ValueError, RecursionError):
        raise RequestError("The body is not valid JSON.", "Send a JSON object encoded as UTF-8.", status=400) from None
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.", "Send fields by name.", status=400)
    return value
