from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ml_backend.errors import ConfigError
from ml_backend.labeling_config import MASK_TAGS, Control, parse, recommended_config

CAPTURED = Path(__file__).parent.parent / "fixtures" / "label_studio" / "labeling_config.xml"
BRUSH = '<BrushLabels name="brush" toName="image" smart="false"><Label value="Object"/></BrushLabels>'
IMAGE = '<Image name="image" value="$image"/>'
POINT = '<KeyPoint name="kp" toName="image" smart="true"/>'


def view(*parts: str) -> str:
    return f"<View>{''.join(parts)}</View>"


def test_captured_config() -> None:
    config = parse(CAPTURED.read_text())
    assert (config.image, config.key) == ("image", "image")
    assert config.mask.name == "brush"
    assert config.mask.labels == ("Object", "Wheel")
    assert [c.name for c in config.points] == ["kp"]
    assert config.boxes == ()
    assert config.proposal is not None
    assert config.next_label(True) == config.next_label(False) == "Next click"
    assert config.warnings == ()


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("boxes", [False, True])
def test_recommended_config_is_right(per_class: bool, boxes: bool) -> None:
    labels = ["Car", 'Traffic "light" & <pole>', "Straße"]
    xml = recommended_config(labels, per_class=per_class, boxes=boxes)
    config = parse(xml)
    assert config.warnings == ()
    assert list(config.mask.labels) == labels
    assert len(config.points) == (3 if per_class else 1)
    assert len(config.boxes) == int(boxes)
    assert config.next_label(True) == "Next click: inside?"
    assert config.next_label(False) == "Next click: outside?"
    if per_class:
        assert [config.label_of(c) for c in config.points] == labels
    if boxes:
        assert xml.index("<KeyPoint ") < xml.index("<Rectangle ")


@pytest.mark.parametrize("labels", [[], [""], ["A", "A"], ["A", " "], ["Next click: inside?"]])
def test_recommended_config_refuses(labels: list[str]) -> None:
    with pytest.raises(ConfigError):
        recommended_config(labels)


@pytest.mark.parametrize(
    ("xml", "named"),
    [
        ("", "Settings"),
        ("<View>", "config-xml"),
        (view(BRUSH, POINT), "<Image"),
        (view(IMAGE, POINT), "<BrushLabels"),
        (view(IMAGE, BRUSH), "<KeyPoint"),
        (view(IMAGE, BRUSH, POINT.replace('smart="true"', 'smart="false"')), "<KeyPoint"),
        (view(IMAGE, '<BrushLabels name="b" toName="image"/>', POINT), "<Label"),
        (view('<Image name="image"/>', BRUSH, POINT), 'value="$image"'),
        ('<!DOCTYPE a [<!ENTITY b "c">]><View>&b;</View>', "plain XML"),
        ("<View/>\ud800", "config-xml"),
    ],
)
def test_errors_name_the_xml_to_add(xml: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(xml)
    assert named in caught.value.hint
    assert caught.value.status == 400


def test_of_several_images_the_clicked_one_counts() -> None:
    other = [part.replace('"image"', '"b"').replace('"brush"', '"brush2"') for part in (IMAGE, BRUSH, POINT)]
    xml = view(IMAGE, BRUSH, POINT, *[o.replace("$image", "$second").replace('"kp"', '"kp2"') for o in other])
    assert parse(xml).mask.name == "brush"
    second = parse(xml, "b")
    assert (second.image, second.key, second.mask.name, second.points[0].name) == ("b", "second", "brush2", "kp2")
    assert parse(xml, "unknown").image == "image"


def test_an_image_without_brush_is_passed_over() -> None:
    xml = view('<Image name="map" value="$map"/>', IMAGE, BRUSH, POINT)
    assert parse(xml).image == "image"


@pytest.mark.parametrize(
    ("name", "chosen", "label"),
    [
        ("kp", None, "Car"),
        ("kp-traffic-light", None, "Traffic light"),
        ("kp_Traffic_Light", None, "Traffic light"),
        ("kp-unknown", None, "Car"),
        ("kp-car", "Traffic light", "Traffic light"),
        ("kp", "unknown", "Car"),
    ],
)
def test_label_of_a_prompt(name: str, chosen: str | None, label: str) -> None:
    config = parse(recommended_config(["Car", "Traffic light"]))
    assert config.label_of(Control(name, "keypoint"), chosen) == label


def test_aliases_are_what_the_page_saves() -> None:
    brush = '<BrushLabels name="b" toName="image" smart="false"><Label value="Traffic light" alias="tl"/></BrushLabels>'
    config = parse(view(IMAGE, brush, POINT))
    assert config.mask.labels == ("tl",)
    assert config.label_of(config.points[0], "Traffic light") == "tl"
    assert config.label_of(Control("kp-traffic-light", "keypoint")) == "tl"


def test_warnings() -> None:
    xml = view(
        IMAGE,
        BRUSH.replace(' smart="false"', ""),
        '<Rectangle name="rect" toName="image"/>',
        '<KeyPointLabels name="kp" toName="image"><Label value="Object"/></KeyPointLabels>',
    )
    said = " ".join(parse(xml).warnings)
    for words in ("no ring", "`brush` is a smart tool", "put `kp` before it", "unselects"):
        assert words in said


def test_plain_brush_and_several_targets() -> None:
    config = parse(view(IMAGE, '<Brush name="b" toName="other, image" smart="false"/>', POINT))
    assert config.mask.tag == "brush"
    assert config.label_of(config.points[0]) is None


@hypothesis_settings(deadline=None, max_examples=400)
@given(st.lists(st.text(max_size=12), max_size=4), st.booleans(), st.booleans())
def test_any_labels_are_refused_or_come_back_as_they_are(labels: list[str], per_class: bool, boxes: bool) -> None:
    try:
        xml = recommended_config(labels, per_class=per_class, boxes=boxes)
    except ConfigError as error:
        assert error.hint
        return
    config = parse(xml)
    assert list(config.mask.labels) == [label.strip() for label in labels]
    assert config.warnings == ()
    assert xml.encode().decode() == xml
    if per_class:
        assert [config.label_of(point) for point in config.points] == list(config.mask.labels)


TAGS = ["View", "Image", "BrushLabels", "Brush", "KeyPoint", "KeyPointLabels", "RectangleLabels", "Rectangle", "Label"]
ATTRIBUTES = ["name", "toName", "value", "valueList", "smart", "alias"]
TEXTS = ["", "image", "img2", "$image", "$", "image,img2", "next", "Next click: inside?", "A", "B", "true", "false"]
elements: st.SearchStrategy[str] = st.recursive(
    st.just(""),
    lambda inner: st.builds(
        lambda tag, attributes, children: f"<{tag}{attributes}>{''.join(children)}</{tag}>",
        st.sampled_from([*TAGS, "View", "Header"]),
        st.dictionaries(st.sampled_from(ATTRIBUTES), st.sampled_from(TEXTS)).map(
            lambda found: "".join(f' {name}="{value}"' for name, value in found.items())
        ),
        st.lists(inner, max_size=4),
    ),
    max_leaves=12,
)
likely = st.lists(st.sampled_from([IMAGE, BRUSH, POINT]) | elements, max_size=6).map(lambda parts: view(*parts))


@hypothesis_settings(deadline=None, max_examples=400)
@given(likely | elements | st.text(max_size=60), st.none() | st.sampled_from(TEXTS))
def test_any_config_is_read_or_refused_in_words(xml: str, image: str | None) -> None:
    try:
        config = parse(xml, image)
    except ConfigError as error:
        assert error.error
        assert error.hint
        return
    assert config.mask.tag in MASK_TAGS
    assert config.points or config.boxes
    for control in (*config.points, *config.boxes):
        label = config.label_of(control, "A")
        assert label is None or config.mask.tag == "brush" or label in config.mask.labels
