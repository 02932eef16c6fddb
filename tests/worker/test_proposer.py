from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from worker.backbones import Backbone
from worker.contract import Click, Prompts
from worker.decode import Decoded, decode
from worker.encode import Embedding
from worker.guided_filter import guided
from worker.head.features import coarse
from worker.proposer import Proposer

PROMPTS = Prompts(clicks=(Click(x=150.5, y=60.5), Click(x=20.5, y=30.5, positive=False)))


@pytest.fixture(scope="module")
def decoded(backbone: Backbone, embedding: Embedding) -> Decoded:
    return decode(backbone, embedding, PROMPTS)


def test_proposer_is_a_pure_function(backbone: Backbone, decoded: Decoded, tmp_path: Path) -> None:
    proposer = Proposer(backbone, head="default", strategy="default", data_dir=tmp_path)
    one = proposer.propose(decoded, PROMPTS)
    two = proposer.propose(decoded, PROMPTS, maps=True)
    assert one.proposal == two.proposal and one.proposal is not None
    assert 0 < one.proposal.x < 300 and 0 < one.proposal.y < 120
    assert set(two.maps) == {"score", "bald", "entropy", "probability"} and not one.maps
    assert one.logits.shape == decoded.logits.shape
    assert proposer.model_version.startswith(backbone.id)


def test_random_proposals_differ_by_seed_and_by_click(backbone: Backbone, decoded: Decoded, tmp_path: Path) -> None:
    proposer = Proposer(backbone, head="none", strategy="random", data_dir=tmp_path)
    fewer = Prompts(clicks=PROMPTS.clicks[:1])
    found = [
        proposer.propose(decoded, PROMPTS).proposal,
        proposer.propose(decoded, PROMPTS, seed=1).proposal,
        proposer.propose(decoded, fewer).proposal,
    ]
    assert len({(p.x, p.y) for p in found if p is not None}) == 3


def test_no_place_left_is_said(backbone: Backbone, embedding: Embedding, tmp_path: Path) -> None:
    # Clicks keep others 4.7 pixels away: no place is as far from each of these.
    grid = Prompts(clicks=tuple(Click(x=x + 0.5, y=y + 0.5) for x in range(2, 300, 5) for y in range(2, 120, 5)))
    decision = Proposer(backbone, head="none", data_dir=tmp_path).propose(decode(backbone, embedding, grid), grid)
    assert decision.proposal is None
    assert "next to an earlier click" in (decision.stopped or "")


def test_padding_is_no_part_of_what_is_expected(backbone: Backbone, decoded: Decoded, tmp_path: Path) -> None:
    grid = coarse(decoded)
    rows, cols = grid.frame.valid
    assert rows < grid.logits.shape[0]
    decision = Proposer(backbone, head="none", data_dir=tmp_path).propose(decoded, PROMPTS, maps=True)
    inside = decision.maps["probability"]
    shown = grid.logits.numpy() > 0
    assert shown[:rows, :cols].any()
    hit = inside[:rows, :cols][shown[:rows, :cols]].sum()
    missed = inside[:rows, :cols][~shown[:rows, :cols]].sum()
    assert decision.expected_iou == pytest.approx(hit / (shown[:rows, :cols].sum() + missed), rel=1e-3)


def test_the_mask_of_a_head_has_no_ragged_border(backbone: Backbone, decoded: Decoded, tmp_path: Path) -> None:
    proposer = Proposer(replace(backbone, guided=False), head="none", data_dir=tmp_path)
    sam = proposer.propose(decoded, PROMPTS).logits
    proposer.head = replace(proposer.head, shows="head")
    head = proposer.propose(decoded, PROMPTS).logits
    assert torch.equal(sam, decoded.logits)
    rows, cols = decoded.frame.valid

    def border(logits: torch.Tensor) -> int:
        inside = logits[:rows, :cols] > 0
        return int((inside[1:] != inside[:-1]).sum() + (inside[:, 1:] != inside[:, :-1]).sum())

    assert head.shape == sam.shape and 0 < border(head) < border(sam)


@pytest.mark.parametrize("shows", ["sam", "head"])
def test_a_border_is_guided_by_the_image_where_that_suits_the_backbone(
    backbone: Backbone, decoded: Decoded, tmp_path: Path, shows: str
) -> None:
    proposers = [Proposer(replace(backbone, guided=yes), head="none", data_dir=tmp_path) for yes in (False, True)]
    for proposer in proposers:
        proposer.head = replace(proposer.head, shows=shows)
    plain, found = (proposer.propose(decoded, PROMPTS) for proposer in proposers)
    if shows == "sam":
        assert torch.equal(found.logits, guided(decoded.logits, decoded.colours, decoded.frame.valid))
    assert not torch.equal(found.logits > 0, plain.logits > 0)
    assert (found.proposal, found.expected_iou) == (plain.proposal, plain.expected_iou)
