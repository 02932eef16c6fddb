from __future__ import annotations

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from worker.backbones import build
from worker.precision import encoder_precision, half_precision, running_in

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small() -> Sam:
    """The published architecture, small."""
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=128, embed_dim=64, depth=2, num_heads=4, out_chans=32, use_rel_pos=True, window_size=4
    )
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or name == "pos_embed":
            torch.nn.init.normal_(parameter, std=0.02)
    transformer = TwoWayTransformer(depth=1, embedding_dim=32, num_heads=2, mlp_dim=32)
    return Sam(
        encoder, PromptEncoder(32, (8, 8), (128, 128), 16), MaskDecoder(transformer_dim=32, transformer=transformer)
    )


def test_sixteen_bits_only_where_they_are_native(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (({"avx512_bf16": True}, torch.bfloat16), ({"avx512_bf16": False}, None), ({}, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert encoder_precision("auto", CPU, bears_half=True) == expected
        assert encoder_precision("auto", CPU, bears_half=False) is None
        assert encoder_precision("float32", CPU, bears_half=True) is None
        assert build("tiny", device="cpu", precision="auto").precision == expected
    for native, on_cuda in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        assert half_precision(torch.device("cuda")) == on_cuda
    assert half_precision(torch.device("mps")) is None
    with pytest.raises(ValueError, match="auto, float32"):
        encoder_precision("int4", CPU, bears_half=True)


def test_the_encoder_differs_by_rounding_alone(small: Sam) -> None:
    image = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        exact = small.image_encoder(image)
        with running_in(torch.bfloat16, CPU):
            rounded = small.image_encoder(image).float()
        with running_in(None, CPU):
            assert torch.equal(small.image_encoder(image), exact)
    error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.02


def test_embeddings_of_another_precision_have_another_key() -> None:
    backbone = build("tiny", device="cpu")
    assert backbone.precision is None
    assert backbone.embedding_id == backbone.id
    backbone.precision = torch.bfloat16
    assert backbone.embedding_id == f"{backbone.id}-bfloat16"
