from __future__ import annotations

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn

from worker.backbones import build
from worker.backbones.fast_encoder import fast_encoder
from worker.backbones.mobile_sam import TinyViT
from worker.backbones.tiny import TinyEncoder

CPU = torch.device("cpu")


def _encoders() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"tiny": TinyEncoder(96, (8, 8, 16, 16), (1, 2, 1, 1), 32), "mobile_sam": TinyViT()}


def _with_statistics(encoder: nn.Module) -> nn.Module:
    """As after a training: norms that shift and scale."""
    for norm in encoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            nn.init.normal_(norm.running_mean, std=0.2)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return encoder.eval()


@pytest.mark.parametrize("name", ["tiny", "mobile_sam"])
def test_it_says_what_the_encoder_says(name: str) -> None:
    encoder = _with_statistics(_encoders()[name])
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    fast = fast_encoder(encoder, CPU)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fast.modules())
    image = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        expected = encoder(image)
        torch.testing.assert_close(fast(image), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(dict(encoder.state_dict()), before, rtol=0, atol=0)


def test_a_vit_keeps_its_values_and_has_the_channels_last() -> None:
    torch.manual_seed(0)
    vit = ImageEncoderViT(img_size=32, embed_dim=16, depth=2, num_heads=2, out_chans=8).eval()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = vit(image)
        assert fast_encoder(vit, CPU) is vit
        torch.testing.assert_close(vit(image), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        assert vit.patch_embed(image).is_contiguous()
    torch.testing.assert_close(dict(vit.state_dict()), before, rtol=0, atol=0)


def test_on_other_devices_all_stay_as_they_are() -> None:
    tiny = _encoders()["tiny"]
    assert fast_encoder(tiny, torch.device("cuda")) is tiny


def test_the_shipped_model_keeps_its_weights_and_its_embedding() -> None:
    backbone = build("tiny", device="cpu")
    assert backbone.encoder is not backbone.sam.image_encoder
    assert any("norm" in name for name in backbone.sam.state_dict())
    image = torch.randn(1, 3, backbone.image_size, backbone.image_size)
    with torch.inference_mode():
        expected = backbone.sam.image_encoder(image)
        torch.testing.assert_close(backbone.encoder(image), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
