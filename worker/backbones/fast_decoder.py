"""SAM's mask decoder with less memory traffic: the same sums in another order.

On a processor the decoder is bound by memory. What it reads and writes in vain is left out here:
- the grid's positional encoding is added before three projections of each layer; these are linear, so its own
  projection, which never changes, is added to their result, and the three are one product;
- the fused attention is two to three times as quick with a multiple of 16 keys, so that the few tokens that the cells
  ask are filled up to one;
- transposed convolutions whose kernel is as large as their stride are products too, and with the channels last their
  layer norms need no transposition.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from segment_anything.modeling.mask_decoder import MaskDecoder
from torch import Tensor, nn
from torch.nn import functional as F

#: What the number of keys is filled up to a multiple of, where many queries ask few keys.
FILLED = 16


class DecoderOutput(NamedTuple):
    """logits: (B, K + 1, h, w), all masks; iou: (B, K + 1), predicted; upscaled: (B, C, h, w), whose memory has the
    channels last; hyper: (B, K + 1, C), outputs of the hypernetworks."""

    logits: Tensor
    iou: Tensor
    upscaled: Tensor
    hyper: Tensor


class FastDecoder:
    """`decoder` for images whose grid has the positional encoding `dense_pe` (1, D, H, W), or the leading rows and
    columns of it. Holds its weights: they must not change afterwards."""

    @torch.no_grad()
    def __init__(self, decoder: MaskDecoder, dense_pe: Tensor) -> None:
        self._decoder = decoder
        encoding = dense_pe[0].permute(1, 2, 0)  # (H, W, D)
        transformer = decoder.transformer
        self._layers = []
        for layer in transformer.layers:
            keys, queries = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
            self._layers.append(
                _Projection(encoding, (keys.k_proj, True), (keys.v_proj, False), (queries.q_proj, True))
            )
        last = transformer.final_attn_token_to_image
        self._last = _Projection(encoding, (last.k_proj, True), (last.v_proj, False))
        first, norm, _, second, _ = decoder.output_upscaling
        self._upscaling = _Doubling(first), _Doubling(second)
        self._norm: Any = norm

    def __call__(self, features: Tensor, sparse: Tensor, dense: Tensor) -> DecoderOutput:
        """`MaskDecoder.predict_masks` for B prompt sets on one image, without copies of its embedding, and with what
        that returns not: features (1, D, h, w), sparse (B, n, D) and dense (B, D, h, w) prompts, float32."""
        decoder = self._decoder
        batch, (height, width) = sparse.shape[0], features.shape[-2:]
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(batch, -1, -1), sparse], dim=1)
        cells = (features + dense).flatten(2).transpose(1, 2).contiguous()
        hidden, image = self._attend(tokens, cells, (height, width))
        first, second = self._upscaling
        upscaled = first(image.view(batch, height, width, -1))
        upscaled = F.gelu(
            F.layer_norm(upscaled, upscaled.shape[-1:], self._norm.weight, self._norm.bias, self._norm.eps)
        )
        upscaled = F.gelu(second(upscaled))
        count = decoder.num_mask_tokens
        hyper = torch.stack([decoder.output_hypernetworks_mlps[i](hidden[:, 1 + i]) for i in range(count)], dim=1)
        logits = (hyper @ upscaled.flatten(1, 2).transpose(1, 2)).view(batch, count, *upscaled.shape[1:3])
        return DecoderOutput(logits, decoder.iou_prediction_head(hidden[:, 0]), upscaled.permute(0, 3, 1, 2), hyper)

    def _attend(self, tokens: Tensor, image: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """`TwoWayTransformer`: (B, t, D) tokens and cells (B, h w, D) of a `grid` (h, w), both as they leave it."""
        transformer = self._decoder.transformer
        queries = tokens
        for layer, projection in zip(transformer.layers, self._layers, strict=True):
            if layer.skip_first_layer_pe:
                queries = layer.self_attn(q=queries, k=queries, v=queries)  # the published code keeps no residual here
            else:
                placed = queries + tokens
                queries = queries + layer.self_attn(q=placed, k=placed, v=queries)
            queries = layer.norm1(queries)
            keys, values, asked = projection(image, grid)
            queries = layer.norm2(queries + _attention(layer.cross_attn_token_to_image, queries + tokens, keys, values))
            queries = layer.norm3(queries + layer.mlp(queries))
            back = layer.cross_attn_image_to_token
            answer = _cells_ask(back.num_heads, asked, back.k_proj(queries + tokens), back.v_proj(queries))
            image = layer.norm4(back.out_proj(answer).add_(image))
        keys, values = self._last(image, grid)
        last = transformer.final_attn_token_to_image
        return transformer.norm_final_attn(queries + _attention(last, queries + tokens, keys, values)), image


class _Projection:
    """Several projections of the image's cells as one product; of some the cells have their place added before."""

    def __init__(self, encoding: Tensor, *parts: tuple[nn.Linear, bool]) -> None:
        self._weight = torch.cat([linear.weight for linear, _ in parts]).T.contiguous()
        self._constant = torch.cat(
            [linear(encoding) if placed else linear.bias.expand(*encoding.shape[:2], -1) for linear, placed in parts],
            dim=-1,
        )
        self._sizes = [linear.out_features for linear, _ in parts]

    def __call__(self, image: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        constant = self._constant[: grid[0], : grid[1]].flatten(0, 1)
        if len(image) == 1:
            product = torch.addmm(constant, image[0], self._weight)[None]
        else:
            product = (image @ self._weight).add_(constant)
        ends = list(accumulate(self._sizes))
        return tuple(product[..., end - size : end] for size, end in zip(self._sizes, ends, strict=True))


class _Doubling:
    """A transposed convolution with kernel and stride 2 on maps with the channels last: (B, h, w, C) to (B, 2 h, 2 w,
    O)."""

    def __init__(self, convolution: nn.ConvTranspose2d) -> None:
        weight = convolution.weight  # (C, O, 2, 2)
        self._weight = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).contiguous()
        assert convolution.bias is not None
        self._bias = convolution.bias.repeat(4)

    def __call__(self, maps: Tensor) -> Tensor:
        batch, height, width, channels = maps.shape
        doubled = torch.addmm(self._bias, maps.reshape(-1, channels), self._weight)
        return doubled.view(batch, height, width, 2, 2, -1).transpose(2, 3).reshape(batch, 2 * height, 2 * width, -1)


def _attention(attention: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`segment_anything`'s attention, keys and values projected already."""
    answer: Tensor = attention.out_proj(_heads_attend(attention.num_heads, attention.q_proj(queries), keys, values))
    return answer


def _cells_ask(heads: int, cells: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`_heads_attend` for many queries and few keys."""
    count = keys.shape[1]
    more = -count % FILLED if keys.device.type == "cpu" else 0
    if not more:
        return _heads_attend(heads, cells, keys, values)
    mask = torch.zeros(1, count + more)
    mask[:, count:] = -torch.inf
    keys, values = (F.pad(part, (0, 0, 0, more)) for part in (keys, values))
    return _heads_attend(heads, cells, keys, values, mask.expand(cells.shape[1], -1))


def _heads_attend(heads: int, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, n, D) queries on (B, m, D) keys and values, with a mask (n, m) to add or none: (B, n, D)."""
    q, k, v = (part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
