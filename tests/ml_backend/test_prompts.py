from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_backend.errors import RequestError
from ml_backend.labeling_config import parse as parse_config
from ml_backend.labeling_config import recommended_config
from ml_backend.prompts import parse

CONFIG = parse_config(recommended_config(["Car", "Wheel"]))
PER_CLASS = parse_config(recommended_config(["Car", "Wheel"], per_class=True))


def click(x: float = 50.0, y: float = 25.0, positive: object = True, **fields: Any) -> dict[str, Any]:
    return {
        "original_width": 1800,
        "original_height": 1200,
        "image_rotation": 0,
        "value": {"x": x, "y": y, "width": 0.5, "labels": []},
        "is_positive": positive,
        "id": "prompt0001",
        "from_name": "kp",
        "to_name": "image",
        "type": "keypoint",
        "origin": "manual",
    } | fields


def box(rotation: float = 0.0, **fields: Any) -> dict[str, Any]:
    entry = click(id="rect000001", from_name="rect", type="rectangle")
    del entry["is_positive"]
    entry["value"] = {"x": 20.0, "y": 20.0, "width": 10.0, "height": 30.0, "rotation": rotation}
    return entry | fields


def context(*entries: Any) -> dict[str, Any]:
    return {"result": list(entries)}


def test_captured_clicks(capture: Any) -> None:
    body = capture("predict_interactive_plain_keypoint_3_prompts")
    session = parse(body["params"]["context"], parse_config(body["label_config"]))
    assert session is not None
    assert session.ids == ("1WKhcpj497", "1J06TpT_ds", "07C399X5bO")
    assert (session.width, session.height, session.label) == (1800, 1200, "Object")
    assert [c.positive for c in session.prompts.clicks] == [True, True, False]
    first = session.prompts.clicks[0]
    assert first.x == pytest.approx(34.984520123839005 * 18)
    assert first.y == pytest.approx(45.04643962848297 * 12)


def test_captured_rectangle(capture: Any) -> None:
    session = parse(capture("predict_interactive_rectangle")["context"], CONFIG)
    assert session is not None
    found = session.prompts.box
    assert found is not None
    assert session.prompts.clicks == ()
    assert found.x0 == pytest.approx(20.020639834881322 * 18)
    assert found.y1 == pytest.approx((19.96904024767802 + 19.96904024767802) * 12)


@pytest.mark.parametrize("empty", [None, {}, {"result": []}, {"result": None}])
def test_nothing(empty: Any) -> None:
    assert parse(empty, CONFIG) is None


def test_foreign_regions_are_dropped() -> None:
    unsigned = click()
    del unsigned["is_positive"]
    brush = click(type="brushlabels", from_name="brush")
    foreign = [
        unsigned,
        brush,
        click(from_name="next", type="keypointlabels"),
        click(to_name="other"),
        click(from_name=["kp"]),
        click(type=["keypoint"]),
        "text",
        None,
    ]
    assert parse(context(*foreign), CONFIG) is None
    session = parse(context(*foreign, click(id="mine"), *foreign), CONFIG)
    assert session is not None
    assert session.ids == ("mine",)


def test_the_newest_class_decides() -> None:
    entries = [
        click(id="a", from_name="kp-car"),
        click(id="b", from_name="kp-wheel"),
        click(id="c", from_name="kp-wheel", positive=False),
    ]
    session = parse(context(*entries), PER_CLASS)
    assert session is not None
    assert session.ids == ("b", "c")
    assert session.label == "Wheel"


def test_the_newest_rectangle_is_the_object() -> None:
    session = parse(context(box(id="old"), box(id="new")), CONFIG)
    assert session is not None
    assert session.ids == ("new",)


def test_pages_are_kept_apart() -> None:
    session = parse(context(click(id="a", item_index=0), click(id="b", item_index=1)), CONFIG)
    assert session is not None
    assert (session.ids, session.item_index) == (("b",), 1)


def test_a_turned_rectangle_gives_the_box_around_it() -> None:
    session = parse(context(box(rotation=90)), CONFIG)
    assert session is not None
    found = session.prompts.box
    assert found is not None
    # Turned clockwise about its top left corner (360, 240): 180 px across points down, 360 px down points left.
    assert (found.x0, found.y0, found.x1, found.y1) == pytest.approx((0, 240, 360, 420))


def test_prompts_beside_the_image_are_brought_to_its_edge() -> None:
    session = parse(context(click(x=-3, y=104)), CONFIG)
    assert session is not None
    assert (session.prompts.clicks[0].x, session.prompts.clicks[0].y) == (0, 1200)


@pytest.mark.parametrize(
    "entry",
    [
        click(x=math.nan),
        click(x=math.inf),
        click(x=10**400),
        click(x=1e9),
        click(x=True),
        click(positive="yes"),
        click(value=None),
        click(value={"x": 1}),
        click(id=None),
        click(id=""),
        click(original_width=0),
        click(original_width=10**7),
        click(original_height="1200"),
        click(original_height=True),
        click(item_index="first"),
        box(rotation=math.nan),
        box(value={"x": 10, "y": 10, "width": 0, "height": 5}),
        box(value={"x": 150, "y": 10, "width": 5, "height": 5}),
        box(value=[]),
    ],
)
def test_refused_in_words(entry: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        parse(context(entry), CONFIG)
    assert caught.value.status == 422
    assert caught.value.error.endswith(".")
    assert caught.value.hint


@pytest.mark.parametrize("bad", ["text", 3, [], {"result": "text"}, {"result": [click()] * 501}])
def test_refused_contexts(bad: Any) -> None:
    with pytest.raises(RequestError):
        parse(bad, CONFIG)


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.floats(0, 100), st.booleans(), st.integers(1, 5000), st.integers(1, 5000)),
        min_size=1,
        max_size=6,
    )
)
def test_percent_become_pixels(clicks: list[tuple[float, float, bool, int, int]]) -> None:
    width, height = clicks[-1][3:]
    entries = [
        click(x, y, positive, id=str(i), original_width=width, original_height=height)
        for i, (x, y, positive, *_) in enumerate(clicks)
    ]
    before = copy.deepcopy(entries)
    session = parse(context(*entries), CONFIG)
    assert entries == before
    assert session is not None
    for (x, y, positive, *_), found in zip(clicks, session.prompts.clicks, strict=True):
        assert (found.x, found.y) == pytest.approx((x / 100 * width, y / 100 * height))
        assert found.positive is positive
