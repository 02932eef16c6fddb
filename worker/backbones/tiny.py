"""The shipped backbone: a Segment Anything model with a small convolutional image encoder, trained from scratch here.

Everything but the image encoder is `segment_anything`'s own code (prompt encoder, mask decoder, `Sam`), so
`SamPredictor` and every other part of this project use it as they use the published models. Plain 3x3 convolutions,
channels-last, are what a CPU runs fastest; the embedding has stride 8 where the published models have 16, so that the
low-resolution mask is half the input's size and its borders stay sharp in spite of the small input.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

FORMAT = "bald-sam tiny 1"
STRIDE = 8
GRAIN = 32  # sides of inputs are multiples of this
HEAD_CHANNELS = 32  # of each head of the encoder's self-attention
# Kept in float32 on disk: a running variance can leave the range of half precision, and all of these are small.
FULL_PRECISION = ("running_mean", "running_var", "positional_encoding_gaussian_matrix")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut; B x C x H x W to B x C' x H/stride x W/stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride) if stride > 1 else nn.Identity(),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
        nn.init.zeros_(self.norm2.weight)  # every block starts as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class AttentionBlock(nn.Module):
    """Self-attention of all cells and two linear layers, each with layer norm before and a shortcut around it;
    B x C x H x W to the same. Queries and keys know their places, by sines of both coordinates."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query_key, self.value = nn.Linear(channels, 2 * channels), nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        self.mlp1, self.mlp2 = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        for last in (self.out, self.mlp2):  # every block starts as its shortcuts
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        cells: Tensor = x.flatten(2).transpose(1, 2)
        read = self.norm1(cells)
        placed = read + positions(height, width, channels, x.device).to(read)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (*self.query_key(placed).chunk(2, -1), self.value(read))
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        cells = cells + self.out(mixed.transpose(1, 2).flatten(2))
        cells = cells + self.mlp2(F.gelu(self.mlp1(self.norm2(cells))))
        return cells.transpose(1, 2).reshape_as(x)


@lru_cache(maxsize=8)
def positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Sines and cosines of row and column with periods of 2 to 128 cells: (height * width) x `channels`, float32."""
    periods = torch.logspace(1, 7, channels // 4, base=2.0)
    rows, columns = (torch.arange(n)[:, None] * (2 * torch.pi / periods) for n in (height, width))
    row, column = (torch.cat([angles.sin(), angles.cos()], -1) for angles in (rows, columns))
    wide = row[:, None].expand(-1, width, -1), column[None].expand(height, -1, -1)
    return torch.cat(wide, -1).flatten(0, 1).to(device)


class TinyEncoder(nn.Module):
    """Image encoder: a residual network down to stride 32, a top-down path up to stride 8. `attention16` and
    `attention` blocks of self-attention, after the convolutions at strides 16 and 32, let all cells see each other.

    `img_size` is the side S of the padded square input, as in SAM's own encoder; S must be a multiple of 32.
    """

    def __init__(
        self,
        img_size: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        dim: int,
        attention: int = 0,
        attention16: int = 0,
    ) -> None:
        super().__init__()
        if img_size % GRAIN:
            raise ValueError(f"img_size is {img_size}; it must be a multiple of {GRAIN}.")
        self.img_size = img_size
        w4, w8, w16, w32 = widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, w4 // 2, 3, 2, 1, bias=False),
            nn.BatchNorm2d(w4 // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(w4 // 2, w4, 3, 2, 1, bias=False),
            nn.BatchNorm2d(w4),
            nn.ReLU(inplace=True),
        )

        def stage(inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
            rest = [ResidualBlock(outputs, outputs, 1) for _ in range(count - 1)]
            return nn.Sequential(ResidualBlock(inputs, outputs, stride), *rest)

        self.stage4 = stage(w4, w4, blocks[0], 1)
        self.stage8 = stage(w4, w8, blocks[1], 2)
        self.stage16 = stage(w8, w16, blocks[2], 2)
        self.stage32 = stage(w16, w32, blocks[3], 2)
        self.attention16, self.attention = (
            nn.Sequential(*[AttentionBlock(width, max(width // HEAD_CHANNELS, 1)) for _ in range(count)])
            for width, count in ((w16, attention16), (w32, attention))
        )
        self.lateral4 = nn.Conv2d(w4, dim, 2, 2, bias=False)  # the finest features, folded to stride 8
        self.lateral8 = nn.Conv2d(w8, dim, 1, bias=False)
        self.lateral16 = nn.Conv2d(w16, dim, 1, bias=False)
        self.lateral32 = nn.Conv2d(w32, dim, 1, bias=False)
        self.context = nn.Conv2d(w32, dim, 1)  # what the whole image is about, added everywhere
        self.smooth16 = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 1, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)
        )
        self.smooth8 = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 1, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)
        )
        self.neck = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), LayerNorm2d(dim))

    def pyramid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding (B x dim x S/8 x S/8) and the stride-16 features below it (B x dim x S/16 x S/16)."""
        x = x.contiguous(memory_format=torch.channels_last)
        c4 = self.stage4(self.stem(x))
        c8 = self.stage8(c4)
        c16 = self.attention16(self.stage16(c8))
        c32 = self.attention(self.stage32(c16))
        p32 = self.lateral32(c32) + self.context(c32.mean((2, 3), keepdim=True))
        p16 = self.lateral16(c16) + F.interpolate(p32, scale_factor=2.0, mode="nearest")
        p16 = self.smooth16(p16)
        p8 = self.lateral8(c8) + self.lateral4(c4) + F.interpolate(p16, scale_factor=2.0, mode="nearest")
        return self.neck(self.smooth8(p8)), p16

    def forward(self, x: Tensor) -> Tensor:
        """B x 3 x S x S, normalised and padded by `Sam.preprocess`, to the embedding B x dim x S/8 x S/8. Any other
        input does as well whose sides are multiples of 32."""
        return self.pyramid(x)[0]


def _tie(attention: Attention, query_gain: float | None) -> None:
    """Let an attention layer begin by comparing like with like (query_gain) and by handing on what it reads."""
    if query_gain is not None:
        nn.init.orthogonal_(attention.q_proj.weight, query_gain)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        nn.init.zeros_(attention.q_proj.bias)
        nn.init.zeros_(attention.k_proj.bias)
    nn.init.orthogonal_(attention.v_proj.weight)
    attention.out_proj.weight.copy_(attention.v_proj.weight.T)
    nn.init.zeros_(attention.v_proj.bias)
    nn.init.zeros_(attention.out_proj.bias)


@torch.no_grad()
def _start_local(sam: Sam) -> None:
    """Start the decoder where a click acts on its surroundings and brings home what lies under it.

    With the usual random start every token leaves the first self-attention (which has no shortcut) as nearly the same
    average, and attention between clicks and image knows nothing of places; a short training does not get over that.
    """
    transformer, prompts, decoder = sam.mask_decoder.transformer, sam.prompt_encoder, sam.mask_decoder
    for place, layer in enumerate(transformer.layers):
        _tie(layer.self_attn, 1.5 if place == 0 else None)
        _tie(layer.cross_attn_token_to_image, 1.0)
        _tie(layer.cross_attn_image_to_token, 1.0)
    _tie(transformer.final_attn_token_to_image, 1.0)
    embeddings = (*prompts.point_embeddings, prompts.not_a_point_embed, prompts.no_mask_embed)
    for embedding in (*embeddings, decoder.mask_tokens, decoder.iou_token):
        embedding.weight.mul_(0.5)


def build_tiny(
    img_size: int = 384,
    widths: Sequence[int] = (48, 96, 192, 320),
    blocks: Sequence[int] = (1, 2, 3, 2),
    dim: int = 128,
    heads: int = 4,
    mlp_dim: int = 512,
    attention: int = 0,
    attention16: int = 0,
) -> Sam:
    """A `Sam` of the tiny architecture with random weights, in evaluation mode.

    `widths` and `blocks`: channels and residual blocks at strides 4, 8, 16 and 32; `attention16`, `attention`: blocks
    of self-attention at strides 16 and 32; `dim`: channels of the embedding.
    The embedding is dim x S/8 x S/8 for S = `img_size`, low-resolution masks are S/2 x S/2.
    Random numbers come from torch's global generator: call `torch.manual_seed` first for the same weights again.
    """
    side = img_size // STRIDE
    sam = Sam(
        image_encoder=TinyEncoder(img_size, widths, blocks, dim, attention, attention16),
        prompt_encoder=PromptEncoder(
            embed_dim=dim, image_embedding_size=(side, side), input_image_size=(img_size, img_size), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=mlp_dim, num_heads=heads),
            transformer_dim=dim,
            iou_head_depth=3,
            iou_head_hidden_dim=dim,
        ),
    )
    _start_local(sam)
    sam.tiny_config = {
        "img_size": img_size,
        "widths": list(widths),
        "blocks": list(blocks),
        "dim": dim,
        "heads": heads,
        "mlp_dim": mlp_dim,
        "attention": attention,
        "attention16": attention16,
    }
    sam.image_encoder.to(memory_format=torch.channels_last)
    return sam.eval()


def resize_tiny(sam: Sam, img_size: int) -> None:
    """Make a `build_tiny` model expect images padded to another `img_size`; no weight depends on it."""
    side = img_size // STRIDE
    sam.image_encoder.img_size = img_size
    sam.tiny_config["img_size"] = img_size
    sam.prompt_encoder.input_image_size = (img_size, img_size)
    sam.prompt_encoder.image_embedding_size = (side, side)
    sam.prompt_encoder.mask_input_size = (4 * side, 4 * side)


def save_tiny(sam: Sam, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write the weights of a `build_tiny` model in half precision; its sizes and `notes` go to the file's metadata."""
    tensors = {
        name: (value if name.endswith(FULL_PRECISION) or not value.is_floating_point() else value.half())
        .detach()
        .cpu()
        .contiguous()
        for name, value in sam.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    save_file(tensors, path, {"format": FORMAT, "config": json.dumps(sam.tiny_config), **(notes or {})})


def load_tiny(path: Path) -> Sam:
    """The model saved by `save_tiny`: a `Sam` in evaluation mode, float32, on the CPU.

    Raises ValueError, saying what to do, when `path` is missing, damaged, or holds another model's weights.
    """
    remedy = "Give the path of worker/weights/tiny.safetensors, or train one with scripts/train_tiny.py."
    if not Path(path).is_file():
        raise ValueError(f"There is no weights file at {path}. {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}). {remedy}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} does not hold weights of the tiny backbone. {remedy}")
    sam = build_tiny(**json.loads(metadata["config"]))
    state = sam.state_dict()
    expected = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    wrong = [name for name, value in expected.items() if name not in tensors or tensors[name].shape != value.shape]
    if wrong or set(tensors) - set(expected):
        raise ValueError(f"{path} does not fit the sizes that it states ({len(wrong)} tensors differ). {remedy}")
    sam.load_state_dict({**state, **{name: value.to(state[name].dtype) for name, value in tensors.items()}})
    return sam.eval()
