"""An image encoder with less work: the same sums on a processor.

Batch norms that follow a convolution are folded into its weights, and maps have the channels last, which is what a
processor's convolutions read. So do the maps between the blocks of a ViT, if its first convolution writes them so;
otherwise each norm and each sum of its blocks reads across the memory.
"""

from __future__ import annotations

import copy

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fast_encoder(encoder: nn.Module, device: torch.device) -> nn.Module:
    """`encoder`, in evaluation mode, as it is quickest on the CPU; for another device as it is.

    A copy where it has batch norms: the weights must not change afterwards. Of a ViT the weights of the convolutions
    have another order in memory afterwards, and the same values.
    """
    if device.type != "cpu":
        return encoder
    if isinstance(encoder, ImageEncoderViT):
        encoder.patch_embed.to(memory_format=torch.channels_last)
        encoder.neck.to(memory_format=torch.channels_last)
    elif any(isinstance(part, nn.BatchNorm2d) for part in encoder.modules()):
        folded = copy.deepcopy(encoder)
        for module in list(folded.modules()):
            _fold(module)
        return folded.to(memory_format=torch.channels_last)
    return encoder


def _fold(module: nn.Module) -> None:
    """Fold each batch norm among the members of `module` into the convolution that is the member before it."""
    before: tuple[str, nn.Module] | None = None
    for name, part in list(module.named_children()):
        if isinstance(part, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], part))
            setattr(module, name, nn.Identity())
        before = name, part
