from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_backend.body import read_json, without_masks
from ml_backend.errors import RequestError


def draft(length: int) -> dict[str, Any]:
    return {"user": "a@example.com", "result": [{"id": "x", "value": {"format": "rle", "rle": [7] * length}}]}


@pytest.mark.parametrize("indent", [None, 1])
def test_masks_are_emptied_and_the_rest_stays(indent: int | None) -> None:
    body = {"tasks": [{"id": 1, "drafts": [draft(500), draft(0)]}], "label_config": "<View/>", "params": {"rle": "[1]"}}
    found = read_json(without_masks(json.dumps(body, indent=indent).encode()))
    expected = json.loads(json.dumps(body))
    expected["tasks"][0]["drafts"][0]["result"][0]["value"]["rle"] = []
    assert found == expected


def test_reading_200_drafts_parses_no_mask() -> None:
    """Counted, not timed: what is left to parse does not grow with the masks."""
    small, large = (json.dumps({"drafts": [draft(n)] * 200}).encode() for n in (0, 4000))
    assert len(large) > 100 * len(small)
    assert without_masks(large) == small


@pytest.mark.parametrize(
    "text",
    [
        r'{"a": "\"rle\": [1, 2]"}',
        r'{"a\"rle": [1, 2]}',
        '{"rle": [1, "a"]}',
        '{"rle": [[1], 2]}',
        '{"rle": null, "x": [1]}',
        '{"rle"    :   \n\n\n\n\n [1]}',
        '{"rle": [1, 2',
        '"rle"',
        '["rle", [1]]',
    ],
)
def test_what_is_no_mask_stays(text: str) -> None:
    assert without_masks(text.encode()) == text.encode()


values = st.recursive(
    st.none() | st.integers() | st.text() | st.just('"rle": [1]'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("rle") | st.just('x"rle'), inner),
    max_leaves=20,
)


def emptied(value: Any) -> Any:
    """Reference: the same on parsed JSON."""
    if isinstance(value, list):
        return [emptied(item) for item in value]
    if isinstance(value, dict):
        return {
            key: []
            if key == "rle" and isinstance(item, list) and all(isinstance(n, int) for n in item)
            else emptied(item)
            for key, item in value.items()
        }
    return value


@given(values)
def test_against_the_parsed_text(value: Any) -> None:
    assert json.loads(without_masks(json.dumps(value).encode())) == emptied(value)


@pytest.mark.parametrize("body", [b"", b"[]", b"nan", b"\x80", b'{"a": 1'])
def test_bad_bodies(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        read_json(body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\ud800", "\ufffd"),
        (r"a\uDC00b", "a\ufffdb"),
        (r"\ud83d\ude00", "\U0001f600"),
        (r"\ud800\ud83d\ude00\ude00", "\ufffd\U0001f600\ufffd"),
        (r"\u00e9", "\xe9"),
    ],
)
def test_half_characters_are_replaced(text: str, expected: str) -> None:
    assert read_json(f'{{"a": "{text}"}}'.encode()) == {"a": expected}


@pytest.mark.parametrize("body", [b'{"a": "\xed\xa0\x80"}', b'{"a": "\xff"}', '{"a": 1}'.encode("utf-16")])
def test_other_encodings_are_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        read_json(body)


@given(values)
def test_whatever_is_read_can_be_written(value: Any) -> None:
    found = read_json(json.dumps({"a": value}).encode())
    json.dumps(found, ensure_ascii=False).encode()
