"""When no further click is worth making."""

from __future__ import annotations

from dataclasses import dataclass

#: Scores are comparable only within one strategy and head, so thresholds are kept by strategy.
THRESHOLDS: dict[str, float] = {}


@dataclass(frozen=True)
class StoppingRule:
    """Stop when the best score falls under `threshold`; `None` never stops."""

    threshold: float | None = None

    def reason(self, score: float | None) -> str | None:
        """Why there is nothing to propose, in words for the annotator, or None when there is."""
        if score is None:
            return "Every place on the image is next to an earlier click."
        if self.threshold is not None and score < self.threshold:
            return f"The mask looks settled: the best next click promises {score:.3g}, under {self.threshold:.3g}."
        return None
