from __future__ import annotations

from pathlib import Path

import pytest

from ml_backend.errors import ConfigError
from ml_backend.labeling_config import Control, parse, recommended_config

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
