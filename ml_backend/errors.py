"""What can go wrong with a request, in words that tell the person what to do next."""

from __future__ import annotations


class BackendError(Exception):
    """A request that gets a refusal: `error` says what is wrong, `hint` what to do, `status` is the HTTP status."""

    status = 500

    def __init__(self, error: str, hint: str = "", status: int | None = None) -> None:
        super().__init__(error)
        self.error = error
        self.hint = hint
        if status is not None:
            self.status = status

    def __str__(self) -> str:
        return f"{self.error} {self.hint}".strip()


class RequestError(BackendError):
    """The request lacks something or says something impossible."""

    status = 422


class ConfigError(BackendError):
    """The labelling config of the project cannot be used; the hint names the XML to add."""

    status = 400
