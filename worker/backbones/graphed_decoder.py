"""The decoder on a GPU, its hundred small kernels started as one CUDA graph.

What a click costs on a GPU is mostly the starting of kernels. A graph starts all of one decode at once; it is recorded
for a number of prompt tokens when that is first met, and holds the places of its inputs and outputs in memory. The
proposal stays outside: how many Newton steps it takes depends on its values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worker.backbones.fast_decoder import DecoderOutput, FastDecoder

log = logging.getLogger(__name__)

#: Prompt tokens of one object: clicks, SAM's padding point, corners of a box. More are decoded without a graph.
MOST_TOKENS = 24
#: Before a recording, as the libraries choose their kernels and set up their memory.
WARM_UP_RUNS = 3
#: A recording must repeat the decoder's own logits to this share of their largest.
TOLERANCE = 1e-3


class _Recording(NamedTuple):
    """`replay` computes `output` from what lies in `inputs`."""

    replay: Callable[[], None]
    inputs: tuple[Tensor, Tensor, Tensor]
    output: DecoderOutput


class GraphedDecoder:
    """`decoder`, from recordings where there are any: the same arguments and results. Safe to use from several threads
    and streams. Where a recording fails, or does not repeat what it recorded, decoding goes on without it; so it does
    for what was encoded on a processor and has other sides than the recording."""

    def __init__(self, decoder: FastDecoder) -> None:
        self._decoder = decoder
        self._recordings: dict[int, _Recording | None] = {}
        self._lock = Lock()
        self._pool: Any = None
        self._last: torch.cuda.Event | None = None

    def __call__(self, features: Tensor, sparse: Tensor, dense: Tensor) -> DecoderOutput:
        batch, tokens, _ = sparse.shape
        if batch != 1 or tokens > MOST_TOKENS:
            return self._decoder(features, sparse, dense)
        with self._lock:  # a recording has one place for its inputs
            if tokens not in self._recordings:
                self._recordings[tokens] = self._recorded(features, sparse, dense)
            recording = self._recordings[tokens]
            if recording is not None and recording.inputs[0].shape == features.shape:
                return self._replayed(recording, features, sparse, dense)
        return self._decoder(features, sparse, dense)

    def _recorded(self, *given: Tensor) -> _Recording | None:
        """A recording that was tried on these arguments; None where it cannot be had."""
        try:
            # Whatever mode the first caller is in, others are in another.
            with torch.inference_mode(False), torch.no_grad():
                inputs = tuple(one.clone(memory_format=torch.contiguous_format) for one in given)
                recording = self._capture((inputs[0], inputs[1], inputs[2]))
                expected = self._decoder(*inputs).logits
                found = self._replayed(recording, *given).logits
            off = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        except RuntimeError as error:
            log.warning("The decoder cannot be recorded for %d tokens (%s).", given[1].shape[1], error)
            return None
        if not off < TOLERANCE:
            log.warning("A recording for %d tokens is off by %.2g; it is not used.", given[1].shape[1], off)
            return None
        return recording

    def _capture(self, inputs: tuple[Tensor, Tensor, Tensor]) -> _Recording:
        with torch.cuda.device(inputs[0].device):
            beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM_UP_RUNS):
                    self._decoder(*inputs)
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            # Other threads may bring images to the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = self._decoder(*inputs)
            self._pool = graph.pool()
        return _Recording(graph.replay, inputs, output)

    def _replayed(self, recording: _Recording, *given: Tensor) -> DecoderOutput:
        with self._in_turn(given[0].device):
            for place, value in zip(recording.inputs, given, strict=True):
                place.copy_(value)
            recording.replay()
            return DecoderOutput(*(part.clone() for part in recording.output))

    @contextmanager
    def _in_turn(self, device: torch.device) -> Iterator[None]:
        """All recordings share their memory: what the last one found must have been copied, on whatever stream."""
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if self._last is not None:
                stream.wait_event(self._last)
            yield
            self._last = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._last.record(stream)
