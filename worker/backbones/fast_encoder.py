"""A convolutional image encoder with less work: the same sums on a processor.

Batch norms that follow a convolution are folded into its weights, and maps have the channels last, which is what a
processor's convolutions read. A ViT gains nothing from it (docs/results/performance.md).
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fast_encoder(encoder: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `encoder`, in evaluation mode and float32, that is quicker on the CPU; elsewhere, and where it has no
    batch norms, `encoder` itself. The weights must not change afterwards.
    """
    if device.type != "cpu" or not any(isinstance(part, nn.BatchNorm2d) for part in encoder.modules()):
        return encoder
    folded = copy.deepcopy(encoder)
    for module in list(folded.modules()):
        _fold(module)
    return folded.to(memory_format=torch.channels_last)


def _fold(module: nn.Module) -> None:
    """Fold each batch norm among the members of `module` into the convolution that is the member before it."""
    before: tuple[str, nn.Module] | None = None
    for name, part in list(module.named_children()):
        if isinstance(part, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], part))
            setattr(module, name, nn.Identity())
        before = name, part
