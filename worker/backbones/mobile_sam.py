"""MobileSAM: SAM's prompt encoder and mask decoder behind a TinyViT-5M image encoder.

Written from the architecture (TinyViT: Wu et al. 2022, arXiv 2207.10666; MobileSAM: Zhang et al. 2023, arXiv
2306.14289). Module names follow the published state dict, so that `mobile_sam.pt` loads strictly; that includes the
classifier of the pre-training (`norm_head`, `head`), which nothing here uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 1024
PROMPT_DIM = 256
WIDTHS = (64, 128, 160, 320)
DEPTHS = (2, 2, 6, 2)
HEADS = (2, 4, 5, 10)
WINDOWS = (7, 7, 14, 7)
#: Stride of the patch merging after each stage: MobileSAM keeps the last stage at stride 16.
MERGE_STRIDES = (2, 2, 1)
EXPANSION = 4


def _gelu(fresh: Tensor) -> Tensor:
    """GELU in place: to get the memory for another map of this size takes as long as the sums on it."""
    return torch.ops.aten.gelu_(fresh)  # type: ignore[no-any-return]


class ConvNorm(nn.Sequential):
    """Convolution without bias (`c`), then batch normalisation (`bn`)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outputs))


class PatchEmbed(nn.Module):
    """Two strided convolutions: B x 3 x H x W to B x dim x H/4 x W/4."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvNorm(3, dim // 2, 3, 2), nn.GELU(), ConvNorm(dim // 2, dim, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)  # type: ignore[no-any-return]


class MBConv(nn.Module):
    """Inverted residual block: widen, depthwise 3x3, narrow, add."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim * EXPANSION
        self.conv1 = ConvNorm(dim, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = _gelu(self.conv1(x))
        y = _gelu(self.conv2(y))
        return _gelu(self.conv3(y) + x)


class PatchMerging(nn.Module):
    """Change of width and stride between two stages, B x C x H x W in and out."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs)
        self.conv2 = ConvNorm(outputs, outputs, 3, stride, groups=outputs)
        self.conv3 = ConvNorm(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = _gelu(self.conv1(x))
        x = _gelu(self.conv2(x))
        return self.conv3(x)  # type: ignore[no-any-return]


class WindowAttention(nn.Module):
    """Self-attention in one window with a learned bias for each absolute offset (|dy|, |dx|)."""

    attention_bias_idxs: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        # The published table is in order of first appearance, which for a square window is |dy| * window + |dx|.
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"))
        offsets = (y[:, None] - y).abs() * window + (x[:, None] - x).abs()
        self.register_buffer("attention_bias_idxs", offsets, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, window * window, C) to the same shape."""
        batch, tokens, dim = x.shape
        # One head's query, key and value lie side by side in the published projection.
        qkv = self.qkv(self.norm(x)).view(batch, tokens, self.heads, 3, dim // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        # Without the dimension of the batch PyTorch would not take its fused kernel on a processor.
        bias = self.attention_biases[None, :, self.attention_bias_idxs]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Normalised two-layer perceptron on (B, N, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, dim * EXPANSION)
        self.fc2 = nn.Linear(dim * EXPANSION, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(_gelu(self.fc1(self.norm(x))))  # type: ignore[no-any-return]


class TinyViTBlock(nn.Module):
    """Window attention, a depthwise 3x3 convolution across the windows' borders, a perceptron."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(dim, heads, window)
        self.mlp = Mlp(dim)
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W in and out."""
        batch, dim, height, width = x.shape
        size = self.window
        down, right = -height % size, -width % size
        windows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, right, 0, down))
        rows, columns = (height + down) // size, (width + right) // size
        windows = windows.view(batch, rows, size, columns, size, dim).transpose(2, 3)
        windows = self.attn(windows.reshape(-1, size * size, dim))
        windows = windows.view(batch, rows, columns, size, size, dim).transpose(2, 3)
        attended = windows.reshape(batch, rows * size, columns * size, dim)[:, :height, :width]
        x = self.local_conv(x + attended.permute(0, 3, 1, 2))
        mixed: Tensor = self.mlp(x.flatten(2).transpose(1, 2))
        return x + mixed.transpose(1, 2).view_as(x)


class Stage(nn.Module):
    """Blocks at one stride, then the step to the next stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class TinyViT(nn.Module):
    """Image encoder: B x 3 x 1024 x 1024, normalised and padded, to the embedding B x 256 x 64 x 64."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size = IMAGE_SIZE
        self.patch_embed = PatchEmbed(WIDTHS[0])
        self.layers = nn.ModuleList()
        for index, (dim, depth, heads, window) in enumerate(zip(WIDTHS, DEPTHS, HEADS, WINDOWS, strict=True)):
            blocks = [MBConv(dim) if index == 0 else TinyViTBlock(dim, heads, window) for _ in range(depth)]
            last = index == len(WIDTHS) - 1
            self.layers.append(
                Stage(blocks, None if last else PatchMerging(dim, WIDTHS[index + 1], MERGE_STRIDES[index]))
            )
        self.norm_head = nn.LayerNorm(WIDTHS[-1])
        self.head = nn.Linear(WIDTHS[-1], 1000)
        self.neck = nn.Sequential(
            nn.Conv2d(WIDTHS[-1], PROMPT_DIM, 1, bias=False),
            LayerNorm2d(PROMPT_DIM),
            nn.Conv2d(PROMPT_DIM, PROMPT_DIM, 3, padding=1, bias=False),
            LayerNorm2d(PROMPT_DIM),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x)  # type: ignore[no-any-return]


def build_mobile_sam() -> Sam:
    """MobileSAM with random weights, in evaluation mode."""
    side = IMAGE_SIZE // 16
    return Sam(
        image_encoder=TinyViT(),
        prompt_encoder=PromptEncoder(
            embed_dim=PROMPT_DIM,
            image_embedding_size=(side, side),
            input_image_size=(IMAGE_SIZE, IMAGE_SIZE),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=PROMPT_DIM, mlp_dim=2048, num_heads=8),
            transformer_dim=PROMPT_DIM,
            iou_head_depth=3,
            iou_head_hidden_dim=PROMPT_DIM,
        ),
    ).eval()
