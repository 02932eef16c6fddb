from __future__ import annotations

import json
import logging
import sys
import threading
from typing import Any

import pytest

from ml_backend import logs
from ml_backend.settings import Settings

HELD = {
    "basic_auth_user": "ls",
    "basic_auth_pass": "pa55word",
    "token": "t0ken-of-ours",
    "redis_url": "rediss://user:redis-p%40ss@host:6380/0",
    "label_studio_api_key": "api-key-of-ours",
}


def line(message: str, *args: Any, error: BaseException | None = None, as_json: bool = False) -> str:
    info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("here", logging.WARNING, "", 1, message, args, info)
    return logs.Formatter(as_json, logs.secrets_of(Settings(**HELD))).format(record)


@pytest.mark.parametrize(
    "secret", ["pa55word", "t0ken-of-ours", "redis-p%40ss", "redis-p@ss", "api-key-of-ours", "bHM6cGE1NXdvcmQ="]
)
def test_secrets_of_the_settings_are_hidden_wherever_they_come_up(secret: str) -> None:
    try:
        raise ValueError(f"refused: {secret}")
    except ValueError as error:
        for as_json in (False, True):
            said = line("told %s of %s", "somebody", secret, error=error, as_json=as_json)
            assert secret not in said
            assert logs.HIDDEN in said


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Bearer abcdef123456", "abcdef123456"),
        ("header Token 0123456789abcdef", "0123456789abcdef"),
        ("http://bucket/a.png?X-Amz-Signature=feedbeef&x=1", "feedbeef"),
        ("https://store/a.png?sv=1&sig=feedbeef", "feedbeef"),
        ("postgresql://me:hunter22@db/clicks", "hunter22"),
    ],
)
def test_other_credentials_are_hidden_too(text: str, secret: str) -> None:
    said = line(text)
    assert secret not in said
    assert logs.HIDDEN in said


def test_nobody_can_forge_a_line() -> None:
    said = line("path %s", "/x\r\n2026-01-01T00:00:00Z ERROR here forged\x1b[2J")
    assert len(said.splitlines()) == 1
    assert "\x1b" not in said


def test_ids_are_in_each_line_of_their_thread_alone() -> None:
    logs.bind(fresh=True, request="r1")
    logs.bind(session="s1", job=None)
    said = json.loads(line("hello", as_json=True))
    assert (said["request"], said["session"], said["message"], said["level"]) == ("r1", "s1", "hello", "WARNING")
    assert "job" not in said
    assert line("hello").endswith("hello request=r1 session=s1")
    other: list[str] = []
    thread = threading.Thread(target=lambda: other.append(line("hello")))
    thread.start()
    thread.join()
    assert "request" not in other[0]
    logs.bind(fresh=True)


def test_settings_decide(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    try:
        logs.configure(Settings(log_format="json", log_level="warning"), lambda: {"job": "j1"})
        logging.getLogger("x").info("not this")
        logging.getLogger("x").warning("this")
    finally:
        root.setLevel(level)
    (said,) = [json.loads(one) for one in capsys.readouterr().err.splitlines()]
    assert (said["message"], said["job"]) == ("this", "j1")
    assert sys.exc_info() == (None, None, None)
