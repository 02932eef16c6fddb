"""Decoding must be `SamPredictor.predict`, to float noise, and a session a pure function of image and prompts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
from segment_anything import SamPredictor, sam_model_registry

from worker.backbones import Backbone, build
from worker.backbones.tiny import GRAIN
from worker.byte_lru import ByteLRU
from worker.contract import Box, Click, Prompts
from worker.decode import LogitsCache, decode, decode_batch, decode_session
from worker.encode import Embedding, encode
from worker.masks import to_mask

torch.set_num_threads(2)
SIZES = {"tiny": [(200, 301), (701, 333), (97, 97)], "vit_b": [(701, 933)]}
CASES = [(name, size) for name, sizes in SIZES.items() for size in sizes]
BOX = Box(x0=10.5, y0=12, x1=80, y1=90.25)


@cache
def _backbone(name: str) -> Backbone:
    # Padded to the square, as `SamPredictor` does.
    return replace(build(name, device="cpu", random_weights=name == "vit_b"), grain=None)


@cache
def _both(name: str, size: tuple[int, int]) -> tuple[Backbone, Embedding, SamPredictor]:
    """Ours, and `SamPredictor` on an untouched copy of the model that encodes the image itself."""
    backbone = _backbone(name)
    if name == "vit_b":
        stock = sam_model_registry["vit_b"]()
        stock.load_state_dict(backbone.sam.state_dict())
    else:
        stock = backbone.sam
    image = _image(size)
    predictor = SamPredictor(stock.eval())
    predictor.set_image(image)
    embedding = encode(backbone, image)
    # The embedding is kept in half precision; here it is the decoder that is compared.
    torch.testing.assert_close(embedding.features.float(), predictor.features, rtol=1e-3, atol=1e-4)
    predictor.features = embedding.features.float()
    return backbone, embedding, predictor


def _image(size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    rows, cols = np.mgrid[: size[0], : size[1]]
    image = np.random.default_rng(0).integers(0, 60, (*size, 3), dtype=np.uint8)
    image[(rows - size[0] / 2) ** 2 + (cols - size[1] / 2) ** 2 < (min(size) / 3) ** 2] += 150
    return image


def _clicks(count: int, size: tuple[int, int]) -> tuple[Click, ...]:
    rng = np.random.default_rng(count)
    places = rng.random((count, 2)) * (size[1], size[0])
    return tuple(Click(x=x, y=y, positive=i % 3 != 1) for i, (x, y) in enumerate(places.tolist()))


def _predict(
    predictor: SamPredictor, prompts: Prompts, mask_input: torch.Tensor | None, multimask: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    box = prompts.box
    _, iou, logits = predictor.predict(
        point_coords=np.array([(c.x, c.y) for c in prompts.clicks]) if prompts.clicks else None,
        point_labels=np.array([int(c.positive) for c in prompts.clicks]) if prompts.clicks else None,
        box=None if box is None else np.array([box.x0, box.y0, box.x1, box.y1]),
        mask_input=None if mask_input is None else mask_input.numpy(),
        multimask_output=multimask,
    )
    return logits, iou


@pytest.mark.parametrize(("name", "size"), CASES)
def test_equals_sam_predictor(name: str, size: tuple[int, int]) -> None:
    backbone, embedding, predictor = _both(name, size)
    first = Prompts(clicks=_clicks(1, size))
    ours = decode(backbone, embedding, first)
    logits, iou = _predict(predictor, first, None, multimask=True)
    best = int(iou.argmax())
    np.testing.assert_allclose(ours.candidates.numpy(), logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours.logits.numpy(), logits[best], atol=1e-4, rtol=0)
    assert ours.predicted_iou == pytest.approx(float(iou[best]), abs=1e-4)
    mask_input = torch.from_numpy(logits[best][None])
    sets = [Prompts(clicks=_clicks(count, size)) for count in range(1, 11)]
    sets += [Prompts(box=BOX), Prompts(box=BOX, clicks=_clicks(2, size))]
    for prompts in sets:
        for given in (None, mask_input) if len(prompts.clicks) != 1 else (mask_input,):
            expected, iou = _predict(predictor, prompts, given, multimask=False)
            found = decode(backbone, embedding, prompts, given)
            np.testing.assert_allclose(found.logits.numpy(), expected[0], atol=1e-4, rtol=0)
            assert found.predicted_iou == pytest.approx(float(iou[0]), abs=1e-4)
            product = torch.einsum("c,chw->hw", found.hyper, found.upscaled)
            torch.testing.assert_close(product, found.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(200, 301), (301, 200)])
def test_without_the_padding_the_mask_is_nearly_the_same(size: tuple[int, int]) -> None:
    square, image = _backbone("tiny"), _image(size)
    trimmed = replace(square, grain=GRAIN)
    prompts = Prompts(clicks=(Click(x=size[1] / 2, y=size[0] / 2), Click(x=5, y=5, positive=False)))
    found = [decode_session(backbone, encode(backbone, image), prompts) for backbone in (square, trimmed)]
    (rows, columns), (fewer_rows, fewer_columns) = (decoded.logits.shape for decoded in found)
    assert rows == columns == max(fewer_rows, fewer_columns)
    assert min(fewer_rows, fewer_columns) < 0.75 * rows
    whole, part = (to_mask(decoded.logits, decoded.frame, prompts) for decoded in found)
    assert (whole & part).sum() > 0.95 * (whole | part).sum()


def test_batch_equals_one_by_one() -> None:
    backbone, embedding, _ = _both("tiny", (200, 301))
    clicks = _clicks(2, (200, 301))
    answers = [Prompts(clicks=(*clicks, Click(x=50, y=60, positive=positive))) for positive in (True, False)]
    mask_input = decode(backbone, embedding, Prompts(clicks=clicks)).logits[None]
    for together, prompts in zip(decode_batch(backbone, embedding, answers, mask_input), answers, strict=True):
        alone = decode(backbone, embedding, prompts, mask_input)
        torch.testing.assert_close(together.logits, alone.logits, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="same number of clicks"):
        decode_batch(backbone, embedding, [Prompts(clicks=clicks), Prompts(clicks=clicks[:1])])
    with pytest.raises(ValueError, match="at least one click or a box"):
        decode(backbone, embedding, Prompts())


@pytest.mark.parametrize("box", [None, BOX])
def test_session_is_pure(box: Box | None) -> None:
    size = (200, 301)
    backbone, embedding, _ = _both("tiny", size)
    clicks = _clicks(4, size)
    mask_input, by_hand = None, None
    for count in range(0 if box else 1, 5):
        by_hand = decode(backbone, embedding, Prompts(clicks=clicks[:count], box=box), mask_input)
        mask_input = by_hand.logits[None]
    assert by_hand is not None
    warm: LogitsCache = ByteLRU(1 << 24)
    for count in range(1, 5):
        answer = decode_session(backbone, embedding, Prompts(clicks=clicks[:count], box=box), warm, "image")
    cold = decode_session(backbone, embedding, Prompts(clicks=clicks, box=box))
    forgetful: LogitsCache = ByteLRU(0)
    lost = decode_session(backbone, embedding, Prompts(clicks=clicks, box=box), forgetful, "image")
    for other in (cold, lost, by_hand):
        assert torch.equal(answer.logits, other.logits)
    moved = Prompts(clicks=(clicks[0], clicks[2], clicks[3]), box=box)
    expected = decode_session(backbone, embedding, moved)
    assert torch.equal(decode_session(backbone, embedding, moved, warm, "image").logits, expected.logits)
