from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT

from evaluation.bench.encoder_ways import _without_positions, left_out, ways_of
from evaluation.bench.report import write
from worker.backbones import build


@pytest.fixture(autouse=True)
def few_threads() -> None:
    torch.set_num_threads(1)


def test_each_way_runs_the_same_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build("tiny", device="cpu")
    ways = ways_of(backbone, None)
    assert [name for name, way in ways.items() if way.chosen] == ["float32, norms folded, channels-last"]
    image = torch.randn(1, 3, backbone.image_size, backbone.image_size)
    found = {}
    for name, way in ways.items():
        if not way.slow_start:
            way.make()
            with torch.inference_mode():
                found[name] = way.run(image).float()
    assert len(found) == 3
    published = found.pop("float32 as published")
    for features in found.values():
        assert (features - published).norm() < 0.02 * published.norm()

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        ways["ONNX Runtime, float32"].make()
    assert left_out(caught.value) == "onnxruntime is not installed"


def test_the_floor_is_the_encoder_without_its_relative_positions() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "out_chans": 16, "window_size": 2}
    encoder = ImageEncoderViT(**sizes, use_rel_pos=True, global_attn_indexes=(1,)).eval()
    plain = ImageEncoderViT(**sizes, use_rel_pos=False, global_attn_indexes=(1,)).eval()
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter)
    plain.load_state_dict(encoder.state_dict(), strict=False)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        with_positions = encoder(image)
        torch.testing.assert_close(_without_positions(encoder, encoder)(image), plain(image))
        assert not torch.allclose(with_positions, plain(image))
        torch.testing.assert_close(encoder(image), with_positions, rtol=0, atol=0)


def test_what_cannot_be_had_fits_into_a_cell() -> None:
    assert left_out(RuntimeError("no | compiler\nat all")) == "RuntimeError: no / compiler"
    assert left_out(ValueError()) == "ValueError: "


def test_the_table_names_what_is_in_use_and_why_a_way_is_left_out(tmp_path: Path) -> None:
    ran = {"seconds": 2.0, "speed_up": 1.5, "relative_error": 0.0, "mask_iou": 1.0, "chosen": True}
    write({"encoder": {"tiny": {"quick": ran, "other": {"left_out": "it is not installed"}}}}, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| `tiny`, **quick** (in use) | 2 | 1.5 | 0.0e+00 | 1.0 | - |" in text
    assert "| `tiny`, other | left out: it is not installed |  |  |  |  |" in text
