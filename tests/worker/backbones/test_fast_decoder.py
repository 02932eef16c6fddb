from __future__ import annotations

import pytest
import torch

from worker.backbones import Backbone, build


@pytest.fixture(scope="module", params=["tiny", "vit_b"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return build(request.param, device="cpu", random_weights=request.param != "tiny")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_published_decoder(backbone: Backbone, batch: int, share: float) -> None:
    """Logits and predicted IoU are those of `MaskDecoder.predict_masks`, on the whole grid and on its upper part;
    logits are hyper times upscaled."""
    generator = torch.Generator().manual_seed(0)
    _, channels, height, width = backbone.dense_pe.shape
    height = int(share * height)
    encoding = backbone.dense_pe[:, :, :height]
    features = torch.randn(1, channels, height, width, generator=generator)
    sparse = torch.randn(batch, 4, channels, generator=generator)
    dense = torch.randn(batch, channels, height, width, generator=generator)
    with torch.no_grad():
        ours = backbone.decoder(features, sparse, dense)
        for index in range(batch):
            one = slice(index, index + 1)
            logits, iou = backbone.sam.mask_decoder.predict_masks(features, encoding, sparse[one], dense[one])
            torch.testing.assert_close(ours.logits[one], logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.iou[one], iou, rtol=1e-4, atol=1e-4)
    product = torch.einsum("bkc,bchw->bkhw", ours.hyper, ours.upscaled)
    torch.testing.assert_close(product, ours.logits, rtol=1e-4, atol=1e-4)
    assert ours.upscaled.shape == (batch, channels // 8, 4 * height, 4 * width)
