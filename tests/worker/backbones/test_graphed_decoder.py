"""Without a GPU the recording itself is stood in for: what is tried here is everything about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from worker.backbones import Backbone, build
from worker.backbones.fast_decoder import FastDecoder
from worker.backbones.graphed_decoder import MOST_TOKENS, GraphedDecoder, _Recording


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build("tiny", device="cpu")


@pytest.fixture(scope="module")
def fast(backbone: Backbone) -> FastDecoder:
    return FastDecoder(backbone.sam.mask_decoder, backbone.dense_pe)


class Recorder(GraphedDecoder):
    """Records as CUDA does: a replay reads and writes the same places, whatever has been put there."""

    def __init__(self, decoder: FastDecoder) -> None:
        super().__init__(decoder)
        self.captured: list[int] = []
        self.replays = 0
        self.error = 0.0

    def _capture(self, inputs: tuple[Tensor, Tensor, Tensor]) -> _Recording:
        self.captured.append(inputs[1].shape[1])
        output = self._decoder(*inputs)

        def replay() -> None:
            self.replays += 1
            for place, value in zip(output, self._decoder(*inputs), strict=True):
                place.copy_(value + self.error)

        return _Recording(replay, inputs, output)

    @contextmanager
    def _in_turn(self, device: torch.device) -> Iterator[None]:
        yield


def given(backbone: Backbone, seed: int, tokens: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    _, channels, height, width = backbone.dense_pe.shape
    dense = torch.randn(batch, channels, 1, 1, generator=generator).expand(-1, -1, height, width)
    sparse = torch.randn(batch, tokens, channels, generator=generator)
    return torch.randn(1, channels, height, width, generator=generator), sparse, dense


def test_the_same_results_whatever_was_recorded_before(backbone: Backbone, fast: FastDecoder) -> None:
    recorder = Recorder(fast)
    kept = []
    with torch.inference_mode():  # as a batch does; clicks come outside of it
        recorder(*given(backbone, 0, 2))
    with torch.no_grad():
        for seed, tokens in ((1, 2), (2, 3), (3, 2), (4, 3)):
            arguments = given(backbone, seed, tokens)
            kept.append((recorder(*arguments), fast(*arguments)))
    for ours, theirs in kept:  # copies: later replays did not touch them
        for part, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(part, expected)
            assert part.stride() == expected.stride()
    assert recorder.captured == [2, 3]
    assert recorder.replays == 2 + 1 + 4  # each recording is tried once


def test_batches_and_long_sessions_go_without(backbone: Backbone, fast: FastDecoder) -> None:
    recorder = Recorder(fast)
    with torch.no_grad():
        for arguments in (given(backbone, 0, 2, batch=2), given(backbone, 0, MOST_TOKENS + 1)):
            torch.testing.assert_close(recorder(*arguments).logits, fast(*arguments).logits)
    assert recorder.captured == []


def test_what_was_encoded_elsewhere_without_padding_goes_without(backbone: Backbone, fast: FastDecoder) -> None:
    recorder = Recorder(fast)
    features, sparse, dense = given(backbone, 0, 2)
    with torch.no_grad():
        recorder(features, sparse, dense)
        upper = features[:, :, :20], sparse, dense[:, :, :20]
        torch.testing.assert_close(recorder(*upper).logits, fast(*upper).logits)
    assert recorder.replays == 2  # the whole grid's: tried, and used


def decodes_and_tries_once(recorder: Recorder, fast: FastDecoder, backbone: Backbone) -> None:
    arguments = given(backbone, 0, 2)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(recorder(*arguments).logits, fast(*arguments).logits)
    assert recorder.captured == [2]


def test_a_recording_that_does_not_repeat_itself_is_not_used(
    backbone: Backbone, fast: FastDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(fast)
    recorder.error = 1.0
    decodes_and_tries_once(recorder, fast, backbone)
    assert "is not used" in caplog.text


def test_where_nothing_can_be_recorded_it_is_tried_once(
    backbone: Backbone, fast: FastDecoder, caplog: pytest.LogCaptureFixture
) -> None:

    class Refused(Recorder):
        def _capture(self, inputs: tuple[Tensor, Tensor, Tensor]) -> _Recording:
            self.captured.append(inputs[1].shape[1])
            raise RuntimeError("no memory for it")

    recorder = Refused(fast)
    decodes_and_tries_once(recorder, fast, backbone)
    assert "cannot be recorded for 2 tokens (no memory for it)" in caplog.text
