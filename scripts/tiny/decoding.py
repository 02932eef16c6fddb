"""SAM's prompt encoder and mask decoder on a batch in which every object brings its own image embedding.

`MaskDecoder.predict_masks` repeats the embedding for every prompt set; here sizes already match, so nothing is
repeated. The modules, and so the trained weights, are segment_anything's; a test holds the two to the same numbers.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import Sam
from torch import Tensor

NOTHING, NEGATIVE, POSITIVE, CORNER, OTHER_CORNER = -1, 0, 1, 2, 3  # what a prompt token is


def prompt_tokens(sam: Sam, points: Tensor, kinds: Tensor) -> Tensor:
    """N x T x 2 points ((x, y), pixels of the input frame) and N x T kinds to N x T x C tokens."""
    encoder = sam.prompt_encoder
    position = encoder.pe_layer.forward_with_coords(points + 0.5, encoder.input_image_size)
    table = torch.cat([encoder.not_a_point_embed.weight, *[e.weight for e in encoder.point_embeddings]])
    return position * (kinds >= 0)[..., None] + table[kinds + 1]


def decode(
    sam: Sam, embeddings: Tensor, image_pe: Tensor, tokens: Tensor, mask_input: Tensor | None
) -> tuple[Tensor, Tensor]:
    """N x C x h x w embeddings, 1 x C x h x w positions, N x T x C tokens and N x 1 x 4h x 4w logits or None,
    to all four masks (N x 4 x 4h x 4w logits; 0 is the single mask, 1..3 the alternatives) and their predicted IoU."""
    decoder, encoder = sam.mask_decoder, sam.prompt_encoder
    if mask_input is None:
        source = embeddings + encoder.no_mask_embed.weight[:, :, None, None]
    else:
        source = embeddings + encoder.mask_downscaling(mask_input)
    n, c, h, w = source.shape
    out = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(n, -1, -1)
    hidden, source = decoder.transformer(source, image_pe.expand(n, -1, -1, -1), torch.cat([out, tokens], 1))
    upscaled = decoder.output_upscaling(source.transpose(1, 2).reshape(n, c, h, w))
    hyper = torch.stack([mlp(hidden[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1)
    masks = (hyper @ upscaled.flatten(2)).view(n, -1, 4 * h, 4 * w)
    return masks, decoder.iou_prediction_head(hidden[:, 0])
