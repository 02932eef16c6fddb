"""What may run an image encoder: the published code, ours, and compilers and quantisers that were weighed against it.

The published code comes first; all others are compared with it.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from segment_anything import sam_model_registry
from torch import Tensor, nn

from evaluation.bench.setup import published
from worker.backbones import Backbone
from worker.backbones.fast_encoder import fast_encoder
from worker.precision import half_precision, running_in

Run = Callable[[Tensor], Tensor]


class Way:
    """One way. `make` gets it ready, and raises where it cannot be had; then `run`: normalised, padded images
    (1, 3, S, S) to embeddings. `slow_start`: getting ready takes long; `chosen`: clicks use it."""

    def __init__(self, make: Callable[[], Run], *, slow_start: bool = False, chosen: bool = False) -> None:
        self._make = make
        self.slow_start, self.chosen = slow_start, chosen
        self.run: Run = _not_made

    def make(self) -> None:
        self.run = self._make()


def ways_of(backbone: Backbone, chosen: torch.dtype | None) -> dict[str, Way]:
    """The ways by name; `chosen`: the number type of the encoder for clicks, None for float32."""
    vit = backbone.name in sam_model_registry
    ours = backbone.encoder
    how = "norms folded, channels-last" if ours is not backbone.sam.image_encoder else ""
    if vit:
        how = "fused attention" + (", channels-last" if backbone.device.type == "cpu" else "")
    low = half_precision(backbone.device) or torch.bfloat16
    best = f"{_name(chosen)}, {how}".rstrip(", ")

    def as_published() -> nn.Module:
        return (published(backbone) if vit else backbone.sam).image_encoder  # type: ignore[no-any-return]

    def in_type(encoder: Run, dtype: torch.dtype | None) -> Run:
        def run(image: Tensor) -> Tensor:
            with running_in(dtype, backbone.device):
                return encoder(image)

        return run

    ways = {"float32 as published": Way(as_published, chosen=not how and chosen is None)}
    if vit and backbone.device.type == "cpu":
        ways["float32, channels-last"] = Way(lambda: fast_encoder(as_published(), backbone.device))
    if how:
        ways[f"float32, {how}"] = Way(lambda: ours, chosen=chosen is None)
    ways[f"{_name(low)}, {how}".rstrip(", ")] = Way(lambda: in_type(ours, low), chosen=chosen is low)
    if vit:
        ways[f"floor: {best}, without its relative positions"] = Way(
            lambda: _without_positions(in_type(ours, chosen), ours)
        )
        ways[f"int8 linear layers, {how}"] = Way(lambda: _quantised(ours, backbone.device))
    ways[f"torch.compile, {best}"] = Way(lambda: torch.compile(in_type(ours, chosen)), slow_start=True)
    ways["ONNX Runtime, float32"] = Way(lambda: _onnx(ours, backbone), slow_start=True)
    return ways


def left_out(error: Exception) -> str:
    """Why a way cannot be had here, on one line that fits into a table."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:100] if lines else ''}".replace("|", "/")


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")


def _not_made(_: Tensor) -> Tensor:
    raise RuntimeError("The way was not made.")


def _without_positions(run: Run, encoder: nn.Module) -> Run:
    """`run` of a ViT `encoder` with plain attention: what the relative positions cost is then known. Its masks are not
    the model's."""
    attentions = [block.attn for block in encoder.blocks]  # type: ignore[union-attr]

    def without(image: Tensor) -> Tensor:
        for attention in attentions:
            attention.use_rel_pos = False
        try:
            return run(image)
        finally:
            for attention in attentions:
                attention.use_rel_pos = True

    return without


def _quantised(encoder: nn.Module, device: torch.device) -> Run:
    if device.type != "cpu":
        raise ValueError("dynamic quantisation runs on a CPU alone")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another package will do this one day
        quantise: Any = torch.ao.quantization.quantize_dynamic
        found: Run = quantise(encoder, {nn.Linear}, dtype=torch.qint8)
    return found


def _onnx(encoder: nn.Module, backbone: Backbone) -> Run:
    runtime = importlib.import_module("onnxruntime")
    importlib.import_module("onnx")
    side = backbone.image_size
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        path = Path(folder) / "encoder.onnx"
        example = torch.zeros(1, 3, side, side, device=backbone.device)
        torch.onnx.export(
            encoder, (example,), path, dynamo=False, opset_version=17, input_names=["image"], output_names=["features"]
        )
        provider = "CUDAExecutionProvider" if backbone.device.type == "cuda" else "CPUExecutionProvider"
        session = runtime.InferenceSession(path, options, providers=[provider])
    if provider not in session.get_providers():
        raise ValueError(f"this ONNX Runtime has no {provider}")
    return lambda image: torch.from_numpy(session.run(None, {"image": image.cpu().numpy()})[0]).to(image.device)
