"""MobileSAM's parameter tree is a published fact: `mobile_sam.pt` must load strictly. The file itself is not at hand
here, so these tests hold the tree against the published architecture's names, shapes and totals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from worker.backbones.mobile_sam import WindowAttention, build_mobile_sam

# Names, shapes: stated from the published encoder's structure.
FACTS = {
    "patch_embed.seq.0.c.weight": (32, 3, 3, 3),
    "patch_embed.seq.2.bn.running_var": (64,),
    "layers.0.blocks.1.conv2.c.weight": (256, 1, 3, 3),
    "layers.0.downsample.conv1.c.weight": (128, 64, 1, 1),
    "layers.1.blocks.0.attn.attention_biases": (4, 49),
    "layers.1.blocks.0.attn.qkv.weight": (384, 128),
    "layers.1.downsample.conv2.c.weight": (160, 1, 3, 3),
    "layers.2.blocks.5.attn.attention_biases": (5, 196),
    "layers.2.blocks.5.local_conv.c.weight": (160, 1, 3, 3),
    "layers.2.blocks.5.local_conv.bn.num_batches_tracked": (),
    "layers.2.downsample.conv3.c.weight": (320, 320, 1, 1),
    "layers.3.blocks.1.attn.norm.weight": (320,),
    "layers.3.blocks.1.mlp.norm.bias": (320,),
    "layers.3.blocks.1.mlp.fc1.weight": (1280, 320),
    "norm_head.weight": (320,),
    "head.weight": (1000, 320),
    "neck.0.weight": (256, 320, 1, 1),
    "neck.1.weight": (256,),
    "neck.2.weight": (256, 256, 3, 3),
}


def test_parameter_tree() -> None:
    with torch.device("meta"):
        sam = build_mobile_sam()
    state = sam.image_encoder.state_dict()
    for name, shape in FACTS.items():
        assert tuple(state[name].shape) == shape, name
    assert not [name for name in state if "attention_bias_idxs" in name or name.endswith(".ab")]
    assert sum(p.numel() for p in sam.parameters()) == pytest.approx(10.13e6, abs=0.005e6)
    # 10.13 M float32 and the statistics of the normalisations fill the published 40,728,226 bytes but for the
    # container's headers.
    size = sum(value.numel() * value.element_size() for value in sam.state_dict().values())
    assert 0 < 40_728_226 - size < 250_000


def test_last_stage_keeps_stride_16() -> None:
    with torch.device("meta"):
        sam = build_mobile_sam()
        assert sam.image_encoder(torch.empty(1, 3, 1024, 1024)).shape == (1, 256, 64, 64)


def test_window_attention_equals_explicit_softmax() -> None:
    torch.manual_seed(0)
    window, heads, dim = 3, 2, 8
    attention = WindowAttention(dim, heads, window).double()
    torch.nn.init.normal_(attention.attention_biases)
    x = torch.randn(2, window * window, dim, dtype=torch.float64)
    normed = F.layer_norm(x, (dim,), attention.norm.weight, attention.norm.bias)
    rows = (normed @ attention.qkv.weight.T + attention.qkv.bias).view(2, 9, heads, 12)
    expected = torch.zeros(2, 9, heads, 4, dtype=torch.float64)
    for head in range(heads):
        for i in range(9):
            scores = []
            for j in range(9):
                offset = abs(i // 3 - j // 3) * 3 + abs(i % 3 - j % 3)
                product = (rows[:, i, head, :4] * rows[:, j, head, 4:8]).sum(-1) / 2.0
                scores.append(product + attention.attention_biases[head, offset])
            weights = torch.stack(scores, -1).softmax(-1)
            expected[:, i, head] = torch.einsum("bj,bjc->bc", weights, rows[:, :, head, 8:])
    expected = expected.reshape(2, 9, dim) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), expected)
