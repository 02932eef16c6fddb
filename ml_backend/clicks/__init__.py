"""The click log: every click, what was proposed before it, and what became of the mask.

answer -> `recorder` (memory) -> `journal` (append-only files) -> `store` (database: raw answers, derived clicks) ->
`outcome` (IoU to the submitted mask), `recovery` (lost masks) -> `export`, `report`.
"""

from __future__ import annotations

from ml_backend.arms import Arm
from ml_backend.clicks.events import AnsweredClick, LoggedPrompt, seen_regions
from ml_backend.clicks.recorder import ClickLog

__all__ = ["AnsweredClick", "Arm", "ClickLog", "LoggedPrompt", "seen_regions"]
