"""Which part of the click log is exported or reported."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import ColumnElement

from ml_backend.clicks.schema import objects


@dataclass(frozen=True)
class Filter:
    """Which objects: of these projects (all if empty), begun at or after `since` and before `until` (aware times)."""

    projects: tuple[int, ...] = ()
    since: datetime | None = None
    until: datetime | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """For a query that has `objects` in it."""
        found: list[ColumnElement[bool]] = []
        if self.projects:
            found.append(objects.c.project.in_(self.projects))
        if self.since:
            found.append(objects.c.started >= self.since.timestamp())
        if self.until:
            found.append(objects.c.started < self.until.timestamp())
        return found


def parse_day(text: str) -> datetime:
    """`2026-11-23` (midnight UTC) or an ISO time; without a zone it is UTC. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
