"""Who may come in: Basic authentication, which Label Studio can send, or a bearer token for scripts."""

from __future__ import annotations

import hmac
import ipaddress

from werkzeug.datastructures import Authorization

from ml_backend.errors import BackendError
from ml_backend.settings import Settings


def required(settings: Settings) -> bool:
    """Whether any credentials are set."""
    return bool(settings.token or settings.basic_auth_user or settings.basic_auth_pass)


def allowed(settings: Settings, sent: Authorization | None) -> bool:
    """Whether the Authorization header carries one of the credentials that are set; compared in constant time."""
    if not required(settings):
        return True
    if sent is None:
        return False
    if sent.type == "bearer" and settings.token is not None:
        return _same(sent.token, settings.token.get_secret_value())
    if sent.type == "basic" and settings.basic_auth_user and settings.basic_auth_pass is not None:
        # Both are compared always: which of the two was wrong must not show in the time taken.
        user = _same(sent.username, settings.basic_auth_user)
        password = _same(sent.password, settings.basic_auth_pass.get_secret_value())
        return user and password
    return False


def check_exposure(host: str, settings: Settings, *, no_auth: bool) -> None:
    """Refuse half-set credentials, and an address that others can reach without any, unless that is wanted."""
    if bool(settings.basic_auth_user) != bool(settings.basic_auth_pass):
        raise BackendError("Basic authentication is only half set.", "Set BALD_SAM_BASIC_AUTH_USER and _PASS both.")
    if not (required(settings) or no_auth or _is_loopback(host)):
        raise BackendError(
            f"{host} can be reached from other machines and no credentials are set.",
            "Set BALD_SAM_BASIC_AUTH_USER and BALD_SAM_BASIC_AUTH_PASS (or BALD_SAM_TOKEN), or give --no-auth.",
        )


def _same(sent: str | None, expected: str) -> bool:
    return bool(expected) and hmac.compare_digest((sent or "").encode(errors="surrogatepass"), expected.encode())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
