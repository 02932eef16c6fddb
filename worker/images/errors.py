"""What is said where an image cannot be had."""

from __future__ import annotations


class ImageError(Exception):
    """An image that cannot be had. `error`: what is wrong, `hint`: what to do, `status`: HTTP status for the client."""

    def __init__(self, error: str, hint: str, status: int = 400) -> None:
        super().__init__(f"{error} {hint}")
        self.error = error
        self.hint = hint
        self.status = status
