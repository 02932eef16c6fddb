"""Faster self-attention for SAM's ViT encoders: the same sums through PyTorch's fused kernels.

The decomposed relative positions become the additive mask of `scaled_dot_product_attention`, so that neither the
scaled scores nor their softmax are written to memory. On two CPU cores this halves the time of a ViT-B encoder.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import Tensor
from torch.nn import functional as F


def accelerate(sam: Sam) -> None:
    """Replace the attention of a ViT image encoder in place; other encoders are left as they are."""
    if isinstance(sam.image_encoder, ImageEncoderViT):
        for block in sam.image_encoder.blocks:
            block.attn.forward = partial(fused_attention, block.attn)


def fused_attention(attention: Attention, x: Tensor) -> Tensor:
    """`segment_anything`'s encoder attention: (B, H, W, C) to (B, H, W, C)."""
    batch, height, width, _ = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(x).reshape(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # (B, heads, H * W, C / heads) each
    bias = None
    if attention.use_rel_pos:
        grid = q.reshape(batch * heads, height, width, -1)
        rows = torch.einsum("bhwc,hkc->bhwk", grid, _relative(attention.rel_pos_h, height))
        columns = torch.einsum("bhwc,wkc->bhwk", grid, _relative(attention.rel_pos_w, width))
        bias = (rows[..., :, None] + columns[..., None, :]).reshape(batch, heads, height * width, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    out = out.transpose(1, 2).reshape(batch, height, width, -1)
    return attention.proj(out)  # type: ignore[no-any-return]


def _relative(table: Tensor, size: int) -> Tensor:
    """`get_rel_pos(size, size, table)`, without sending its index to the device each time: (size, size, C)."""
    if len(table) != 2 * size - 1:
        return get_rel_pos(size, size, table)  # type: ignore[no-any-return]
    return table[_differences(size, table.device)]


@cache
def _differences(size: int, device: torch.device) -> Tensor:
    """Row minus column, from 0 on: (size, size) int64."""
    places = torch.arange(size)
    return (places[:, None] - places[None] + size - 1).to(device)
