"""The shipped backbone: a real Sam, loadable from its one file, and good enough that clicking is segmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from evaluation.scenes import draw
from worker.backbones.tiny import AttentionBlock, build_tiny, load_tiny, positions, save_tiny

WEIGHTS = Path(__file__).parents[3] / "worker" / "weights" / "tiny.safetensors"
SMALL = {"img_size": 96, "widths": (8, 8, 16, 16), "blocks": (1, 1, 1, 1), "dim": 32, "mlp_dim": 32}


@pytest.fixture(autouse=True)
def few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def small() -> Sam:
    torch.manual_seed(0)
    return build_tiny(**SMALL)


@pytest.fixture(scope="module")
def shipped() -> Sam:
    return load_tiny(WEIGHTS)


def test_the_sizes_of_embedding_and_masks_follow_from_the_input(small: Sam) -> None:
    assert isinstance(small, Sam)
    assert small.image_encoder(torch.zeros(2, 3, 96, 96)).shape == (2, 32, 12, 12)
    predictor = SamPredictor(small)
    predictor.set_image(np.zeros((60, 80, 3), np.uint8))
    masks, scores, low = predictor.predict(np.array([[10.0, 20.0]]), np.array([1]))
    assert masks.shape == (3, 60, 80)
    assert scores.shape == (3,)
    assert low.shape == (3, 48, 48)
    masks, _, low = predictor.predict(
        np.array([[10.0, 20.0], [40.0, 20.0]]), np.array([1, 0]), mask_input=low[:1], multimask_output=False
    )
    assert masks.shape == (1, 60, 80)
    assert low.shape == (1, 48, 48)


def test_the_predictor_and_the_models_own_forward_agree(small: Sam) -> None:
    image = draw(2, (72, 96), "objects").image
    predictor = SamPredictor(small)
    predictor.set_image(image)
    point, label = np.array([[30.0, 40.0]]), np.array([1])
    masks, scores, low = predictor.predict(point, label)
    record = {
        "image": torch.from_numpy(image).permute(2, 0, 1).float(),
        "original_size": image.shape[:2],
        "point_coords": torch.tensor(point[None], dtype=torch.float32),
        "point_labels": torch.tensor(label[None]),
    }
    own = small([record], multimask_output=True)[0]
    np.testing.assert_allclose(own["low_res_logits"][0].numpy(), low, atol=1e-5)
    np.testing.assert_allclose(own["iou_predictions"][0].numpy(), scores, atol=1e-6)
    assert np.array_equal(own["masks"][0].numpy(), masks)


def test_an_input_side_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        build_tiny(img_size=100)


def test_attention_lets_every_cell_see_every_other_and_know_its_place() -> None:
    torch.manual_seed(1)
    block = AttentionBlock(32, 2).double().eval()
    cells = torch.randn(1, 32, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(block(cells), cells)  # it begins as its shortcuts
    torch.nn.init.normal_(block.out.weight)
    before = block(cells)
    changed = cells.clone()
    changed[0, 0, 2, 4] += 1.0
    assert (block(changed) != before).all(1).all()
    assert not torch.allclose(block(cells.flip(-1)).flip(-1), before)
    assert len(positions(3, 5, 32, torch.device("cpu")).unique(dim=0)) == 15


def test_saving_keeps_the_model_to_half_precision(small: Sam, tmp_path: Path) -> None:
    save_tiny(small, tmp_path / "small.safetensors")
    loaded = load_tiny(tmp_path / "small.safetensors")
    assert not loaded.training
    for name, value in small.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())


def test_the_wrong_file_is_refused_with_what_to_do(small: Sam, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights file at .*Give the path of"):
        load_tiny(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_bytes(b"not a tensor in sight, whatever the name says")
    with pytest.raises(ValueError, match=r"not a readable safetensors file.*Give the path of"):
        load_tiny(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold weights of the tiny backbone"):
        load_tiny(tmp_path / "other.safetensors")


def test_a_file_whose_tensors_do_not_fit_is_refused(small: Sam, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_tiny(small, good)
    from safetensors import safe_open

    with safe_open(good, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(good)
    tensors.pop("mask_decoder.iou_token.weight")
    save_file(tensors, tmp_path / "cut.safetensors", metadata)
    with pytest.raises(ValueError, match=r"does not fit the sizes that it states \(1 tensors differ\)"):
        load_tiny(tmp_path / "cut.safetensors")


def test_the_shipped_file_is_small_enough_to_ship() -> None:
    assert WEIGHTS.stat().st_size <= 20_000_000


def test_three_clicks_on_drawn_scenes_beat_a_circle_about_the_first(shipped: Sam) -> None:
    """The best circle about the first click, its radius chosen knowing the object, is a generous baseline."""
    predictor = SamPredictor(shipped)
    ours, circles = [], []
    for seed in range(900_000, 900_016):  # never drawn in training
        scene = draw(seed, (192, 224))
        number = int(np.bincount(scene.labels[scene.labels > 0]).argmax())
        truth = scene.labels == number
        predictor.set_image(scene.image)
        points: list[tuple[int, int]] = []
        labels: list[int] = []
        mask, low = np.zeros_like(truth), None
        for click in range(3):
            x, y, positive = _next_click(truth, mask)
            points.append((x, y))
            labels.append(int(positive))
            masks, scores, logits = predictor.predict(
                np.array(points, float), np.array(labels), mask_input=low, multimask_output=click == 0
            )
            best = int(scores.argmax())
            mask, low = masks[best], logits[best : best + 1]
        ours.append(_iou(mask, truth))
        ys, xs = np.indices(truth.shape)
        distance = np.hypot(xs - points[0][0], ys - points[0][1])
        circles.append(max(_iou(distance <= radius, truth) for radius in range(2, 120, 4)))
    assert np.mean(ours) > np.mean(circles) + 0.05, (np.mean(ours), np.mean(circles))


def _iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


def _next_click(truth: np.ndarray, mask: np.ndarray) -> tuple[int, int, bool]:
    """The pixel deepest inside the missed or the wrongly covered region, whichever is deeper."""
    import cv2

    depths = [
        cv2.distanceTransform(np.pad(region, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
        for region in (truth & ~mask, mask & ~truth)
    ]
    positive = depths[0].max() >= depths[1].max()
    y, x = np.unravel_index(depths[0 if positive else 1].argmax(), truth.shape)
    return int(x), int(y), bool(positive)
