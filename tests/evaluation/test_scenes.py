"""Drawn scenes: a function of the seed, with usable objects of every kind."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from evaluation.scenes import KINDS, MIN_AREA, draw


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_scene(kind: str) -> None:
    first, second = draw(3, (96, 128), kind), draw(3, (96, 128), kind)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.labels, second.labels)
    assert not np.array_equal(first.image, draw(4, (96, 128), kind).image)


@pytest.mark.parametrize("kind", KINDS)
def test_objects_are_numbered_without_gaps_and_none_is_a_speck(kind: str) -> None:
    for seed in range(4):
        scene = draw(seed, (96, 128), kind)
        assert scene.image.shape == (96, 128, 3)
        assert scene.image.dtype == np.uint8
        assert scene.labels.shape == (96, 128)
        counts = np.bincount(scene.labels.ravel())
        assert len(counts) >= 2
        assert (counts[1:] >= MIN_AREA * scene.labels.size).all()


def test_the_seed_chooses_among_all_kinds() -> None:
    assert {draw(seed, (48, 48)).kind for seed in range(60)} == set(KINDS)


def test_a_group_of_panels_is_one_object_of_several_pieces() -> None:
    pieces = []
    for seed in range(6):
        labels = draw(seed, (192, 192), "parts").labels
        pieces += [cv2.connectedComponents((labels == n).astype(np.uint8))[0] - 1 for n in range(1, labels.max() + 1)]
    assert max(pieces) >= 4


def test_some_objects_have_holes() -> None:
    found = 0
    for seed in range(6):
        labels = draw(seed, (192, 192), "holes").labels
        for number in range(1, labels.max() + 1):
            _, tree = cv2.findContours((labels == number).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
            found += bool((tree[0, :, 3] >= 0).any())
    assert found >= 3


def test_bands_cover_the_whole_section() -> None:
    scene = draw(1, (96, 160), "bands")
    assert (scene.labels > 0).mean() > 0.95
    assert scene.labels.max() >= 2


def test_an_unknown_kind_is_refused_with_the_kinds_there_are() -> None:
    with pytest.raises(ValueError, match=r"no kind of scene called 'blobs'.*objects, thin"):
        draw(0, kind="blobs")
