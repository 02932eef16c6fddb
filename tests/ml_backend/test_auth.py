from __future__ import annotations

from typing import Any

import pytest

from ml_backend.auth import check_exposure
from ml_backend.errors import BackendError
from ml_backend.settings import Settings

USER = {"basic_auth_user": "ls", "basic_auth_pass": "pa55word"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_an_open_address_needs_credentials(host: str) -> None:
    with pytest.raises(BackendError, match="no-auth"):
        check_exposure(host, Settings(), no_auth=False)
    check_exposure(host, Settings(), no_auth=True)
    for credentials in (USER, {"token": "t"}):
        check_exposure(host, Settings(**credentials), no_auth=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    check_exposure(host, Settings(), no_auth=False)


@pytest.mark.parametrize("name", list(USER))
def test_half_a_credential_is_refused(name: str) -> None:
    half: dict[str, Any] = {name: USER[name]}
    with pytest.raises(BackendError, match="half"):
        check_exposure("127.0.0.1", Settings(**half), no_auth=True)


def test_secrets_do_not_show() -> None:
    shown = repr(Settings(**USER, token="t0ken"))
    assert "pa55word" not in shown
    assert "t0ken" not in shown
