"""Which controls of a Label Studio labelling config are the image, the mask, the prompts and the proposal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from xml.etree.ElementTree import Element
from xml.sax.saxutils import quoteattr

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

from ml_backend.errors import ConfigError

POINT_TAGS = frozenset({"keypoint", "keypointlabels"})
BOX_TAGS = frozenset({"rectangle", "rectanglelabels"})
MASK_TAGS = frozenset({"brush", "brushlabels"})

#: Start of the labels of the proposal control, and the two labels of the recommended config.
NEXT_PREFIX = "next click"
NEXT_INSIDE = "Next click: inside?"
NEXT_OUTSIDE = "Next click: outside?"

#: Okabe-Ito colours, told apart by colour-blind people. Vermilion and reddish purple are kept for the proposal.
MASK_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#56b4e9", "#f0e442")
INSIDE_COLOUR = "#cc79a7"
OUTSIDE_COLOUR = "#d55e00"
PROMPT_COLOUR = "#ffd400"

NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

#: Configs of so many characters are not read anew for each click; what is longer may be anything.
KEPT_LENGTH = 50_000

_RUN_CONFIG_XML = "`bald-sam config-xml --labels Object` prints a complete config."


@dataclass(frozen=True)
class Control:
    """One control tag; `tag` in lower case is also the `type` of its results, `labels` are as the page saves them."""

    name: str
    tag: str
    smart: bool = True
    labels: tuple[str, ...] = ()
    #: Label value -> what the page saves for it (its alias, where it has one).
    aliases: tuple[tuple[str, str], ...] = ()

    def label(self, text: str) -> str | None:
        """The label of this control that `text` (a value or an alias) names, as the page saves it."""
        return text if text in self.labels else dict(self.aliases).get(text)


@dataclass(frozen=True)
class LabelingConfig:
    """What one image of a project is annotated with.

    `image`: name of the image control; `key`: where the task data hold its address; `warnings`: sentences about what
    works but not well.
    """

    image: str
    key: str
    mask: Control
    points: tuple[Control, ...]
    boxes: tuple[Control, ...]
    proposal: Control | None = None
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def label_of(self, control: Control, chosen: str | None = None) -> str | None:
        """The brush label of a mask prompted with `control` while its label `chosen` was selected.

        The chosen label if the brush has it; else the label that the control's name carries after its first `-` or
        `_` (`kp-Wheel`, `kp_traffic-light` for "Traffic light"); else the first label. None for a label-less brush.
        """
        if chosen is not None and (label := self.mask.label(chosen)):
            return label
        _, *rest = re.split(r"[-_]", control.name, maxsplit=1)
        wanted = slug(rest[0]) if rest else ""
        by_slug = {slug(value): saved for value, saved in reversed(self.mask.aliases)}
        by_slug |= {slug(label): label for label in reversed(self.mask.labels)}
        return by_slug.get(wanted) or next(iter(self.mask.labels), None)

    def next_label(self, positive: bool) -> str | None:
        """The label of the proposal control that announces the expected answer."""
        if self.proposal is None:
            return None
        word = "inside" if positive else "outside"
        return next((lbl for lbl in self.proposal.labels if word in lbl.casefold()), self.proposal.labels[0])


def slug(text: str) -> str:
    """`Traffic light` -> `traffic-light`: how a label is written in the name of its control."""
    return re.sub(r"[\W_]+", "-", text.casefold()).strip("-")


def parse(label_config: str, to_name: str | None = None) -> LabelingConfig:
    """Read a labelling config.

    `to_name`: the image control that was clicked; without it, the first one that has a brush and a prompt control.
    Raises ConfigError that names the XML to add.
    """
    if not isinstance(label_config, str) or not label_config.strip():
        raise ConfigError(
            "The labelling config of the project is empty.",
            f"Paste one under Settings > Labeling Interface > Code. {_RUN_CONFIG_XML}",
        )
    known = _parse if len(label_config) <= KEPT_LENGTH else _parse.__wrapped__
    return known(label_config, to_name)


@lru_cache(maxsize=256)
def _parse(label_config: str, to_name: str | None) -> LabelingConfig:
    try:
        root = defusedxml.ElementTree.fromstring(label_config)
    except DefusedXmlException:
        raise ConfigError(
            "The labelling config contains an entity or a document type.", "Write it as plain XML."
        ) from None
    except (SyntaxError, ValueError) as exc:
        raise ConfigError(f"The labelling config is not valid XML ({exc}).", _RUN_CONFIG_XML) from None

    images = {
        attributes["name"]: attributes
        for element in root.iter()
        if _tag(element) == "image" and (attributes := _attributes(element)).get("name")
    }
    if not images:
        raise ConfigError(
            "The labelling config has no image.",
            f'Add <Image name="image" value="$image"/>. {_RUN_CONFIG_XML}',
        )
    names = [to_name] if to_name in images else list(images)
    errors = []
    for name in names:
        try:
            return _for_image(root, images[name])
        except ConfigError as exc:
            errors.append(exc)
    raise errors[0]


def _for_image(root: Element, image: dict[str, str]) -> LabelingConfig:
    name = image["name"]
    controls = [
        _control(element)
        for element in root.iter()
        if _tag(element) in POINT_TAGS | BOX_TAGS | MASK_TAGS and _belongs(_attributes(element), name)
    ]
    proposal = next((c for c in controls if _is_proposal(c)), None)
    masks = [c for c in controls if c.tag in MASK_TAGS]
    points = tuple(c for c in controls if c.tag in POINT_TAGS and c.smart and not _is_proposal(c))
    boxes = tuple(c for c in controls if c.tag in BOX_TAGS and c.smart)

    if not masks:
        raise ConfigError(
            f"The labelling config has no brush for the image `{name}`, so a mask has nowhere to go.",
            f'Add <BrushLabels name="brush" toName="{name}" smart="false"><Label value="Object"/></BrushLabels>. '
            + _RUN_CONFIG_XML,
        )
    mask = next((c for c in masks if c.tag == "brushlabels"), masks[0])
    if mask.tag == "brushlabels" and not mask.labels:
        raise ConfigError(
            f"The brush `{mask.name}` has no labels of its own.",
            f'Write at least one <Label value="Object"/> inside <BrushLabels name="{mask.name}">.',
        )
    if not points and not boxes:
        raise ConfigError(
            f"The labelling config has nothing to prompt with on the image `{name}`.",
            f'Add <KeyPoint name="kp" toName="{name}" smart="true" smartOnly="true"/>. {_RUN_CONFIG_XML}',
        )
    key = image.get("value") or image.get("valuelist") or ""
    if not key.startswith("$"):
        raise ConfigError(
            f"The image `{name}` does not say which field of the task holds its address.",
            f'Write <Image name="{name}" value="$image"/>.',
        )
    return LabelingConfig(
        image=name,
        key=key[1:],
        mask=mask,
        points=points,
        boxes=boxes,
        proposal=proposal,
        warnings=tuple(_warnings(name, controls, mask, points, boxes, proposal)),
    )


def _warnings(
    image: str,
    controls: list[Control],
    mask: Control,
    points: tuple[Control, ...],
    boxes: tuple[Control, ...],
    proposal: Control | None,
) -> list[str]:
    said = []
    if proposal is None:
        said.append(
            "No control for the proposed next click, so no ring is shown; add <KeyPointLabels "
            f'name="next" toName="{image}" smart="false" fillOpacity="0.05"><Label value="{NEXT_INSIDE}"/>'
            f'<Label value="{NEXT_OUTSIDE}"/></KeyPointLabels>.'
        )
    said += [
        f'`{c.name}` is a smart tool although nobody prompts with it; write smart="false" on it, else the key M may '
        "select it."
        for c in (mask, proposal)
        if c is not None and c.smart
    ]
    if points and boxes and controls.index(boxes[0]) < controls.index(points[0]):
        said.append(
            f"The key M selects the first smart tool, `{boxes[0].name}`; put `{points[0].name}` before it to click "
            "with M."
        )
    said += [
        f"Label Studio unselects the label of `{c.name}` after each click; a <KeyPoint> without labels needs none."
        for c in points
        if c.tag == "keypointlabels"
    ]
    return said


def _is_proposal(control: Control) -> bool:
    if control.tag != "keypointlabels" or not control.labels:
        return False
    return control.name == "next" or all(lbl.casefold().startswith(NEXT_PREFIX) for lbl in control.labels)


def _control(element: Element) -> Control:
    attributes = _attributes(element)
    labels = [_attributes(child) for child in element.iter() if _tag(child) == "label"]
    named = [(a["value"], a.get("alias") or a["value"]) for a in labels if a.get("value")]
    return Control(
        name=attributes["name"],
        tag=_tag(element),
        smart=attributes.get("smart", "true").strip().lower() != "false",
        labels=tuple(saved for _, saved in named),
        aliases=tuple(named),
    )


def _belongs(attributes: dict[str, str], image: str) -> bool:
    targets = [name.strip() for name in attributes.get("toname", "").split(",")]
    return bool(attributes.get("name")) and image in targets


def _tag(element: Element) -> str:
    return element.tag.lower() if isinstance(element.tag, str) else ""


def _attributes(element: Element) -> dict[str, str]:
    return {name.lower(): value for name, value in element.attrib.items()}


def recommended_config(labels: Sequence[str], *, per_class: bool = False, boxes: bool = True) -> str:
    """The labelling config in which everything works with the default settings of Label Studio.

    `per_class`: one prompt tool for each label instead of one for all; `boxes`: a smart rectangle too.
    Raises ConfigError on empty, repeated or reserved labels.
    """
    names = [label.strip() for label in labels]
    slugs = [slug(name) for name in names]
    if not names or not all(names):
        raise ConfigError("At least one label is needed, and none may be empty.", "For example: --labels Car,Wheel.")
    if any(NOT_XML.search(name) for name in names):
        raise ConfigError("A label holds a character that XML has no place for.", "Write it without.")
    if len(set(names)) < len(names) or (per_class and (len(set(slugs)) < len(slugs) or not all(slugs))):
        raise ConfigError("Two labels are the same or too much alike.", "Give each label a name of its own.")
    if any(name.casefold().startswith(NEXT_PREFIX) for name in names):
        raise ConfigError("Labels that begin with `Next click` are kept for the proposal.", "Choose another name.")

    colours = [MASK_COLOURS[i % len(MASK_COLOURS)] for i in range(len(names))]
    lines = [
        "<View>",
        '  <Image name="image" value="$image" zoom="true" zoomControl="true"/>',
        '  <BrushLabels name="brush" toName="image" smart="false">',
        *(
            f'    <Label value={quoteattr(name)} background="{colour}"/>'
            for name, colour in zip(names, colours, strict=True)
        ),
        "  </BrushLabels>",
    ]
    # The key M selects the first smart tool of the config: the points come before the rectangle.
    points = [(f"kp-{s}", c) for s, c in zip(slugs, colours, strict=True)] if per_class else [("kp", PROMPT_COLOUR)]
    lines += [
        f'  <KeyPoint name="{name}" toName="image" smart="true" smartOnly="true" strokeWidth="5" '
        f'strokeColor="{colour}" fillColor="{colour}"/>'
        for name, colour in points
    ]
    if boxes:
        lines.append('  <Rectangle name="rect" toName="image" smart="true" smartOnly="true"/>')
    lines += [
        '  <View style="display:none">',
        '    <KeyPointLabels name="next" toName="image" smart="false" fillOpacity="0.05">',
        f'      <Label value="{NEXT_INSIDE}" background="{INSIDE_COLOUR}" hotkey="shift+F9"/>',
        f'      <Label value="{NEXT_OUTSIDE}" background="{OUTSIDE_COLOUR}" hotkey="shift+F10"/>',
        "    </KeyPointLabels>",
        "  </View>",
        "</View>",
    ]
    return "\n".join(lines) + "\n"
