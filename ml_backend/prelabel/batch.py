"""What pre-labelling a folder and a project have in common: who does the work (this process, or the workers behind
Redis), and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from worker.contract import PrelabelFailure, PrelabelImage, PrelabelItem, PrelabelOptions

Answer = PrelabelImage | PrelabelFailure


class Batch(Protocol):
    """Who does the work of a batch."""

    def prelabel(self, items: Iterable[PrelabelItem], options: PrelabelOptions) -> Iterator[Answer]:
        """One answer for each item, in any order, as soon as it is made; `items` is read a little ahead.

        Raises JobFailed for what keeps every item from being done.
        """


@dataclass
class Summary:
    """What became of the images of a run. `failed`: why, by image or task; `notes`: sentences for the person."""

    total: int = 0
    done: int = 0
    already: int = 0
    regions: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "total": self.total,
            "done": self.done,
            "already_done": self.already,
            "regions": self.regions,
            "failed": self.failed,
            "notes": self.notes,
        }


#: Told of the summary so far after each image.
Observer = Callable[[Summary], None]
