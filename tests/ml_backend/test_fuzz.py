"""A few hundred of the requests of `scripts/fuzz`; the thousands are for whoever changes the server."""

from __future__ import annotations

from pathlib import Path

from tests.fuzzing import fuzz, served, traces


def test_hostile_requests_are_refused_in_words_and_clicks_answered_in_between(tmp_path: Path) -> None:
    with served(tmp_path) as (port, process, log):
        report = fuzz(port, process, seed=7, count=300)
        assert report.clicks == 3
        assert report.wrong == []
        assert len(report.statuses) > 5
        assert not traces(log.read_text())
