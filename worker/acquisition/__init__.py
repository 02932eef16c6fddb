"""Strategies: how the next click is chosen.

A strategy is a function from a `State` to a score map (h, w), higher is better; the proposal is the allowed pixel with
the largest score. To add one, write a file in this folder with

    @strategy("my-strategy", unit="nats")
    def my_strategy(state: State) -> Tensor:
        '''One line that says what it looks for.'''
        return state.variance

and name the file in `_FILES` below; it can then be given to `bald-sam evaluate --strategies my-strategy`.
"""

from __future__ import annotations

import importlib

from worker.acquisition.registry import REGISTRY, Strategy
from worker.acquisition.state import State

__all__ = ["DEFAULT", "REGISTRY", "State", "Strategy", "find", "names"]

#: What `default` means.
DEFAULT = "error-bald"

_FILES = (
    "random",
    "random_uncertain",
    "entropy",
    "margin",
    "variance",
    "bald",
    "bald_mc",
    "bald_online",
    "bald_region",
    "error_region",
    "error_bald",
    "epig",
    "bald_lookahead",
)


def _load() -> None:
    for file in _FILES:
        importlib.import_module(f"worker.acquisition.{file}")


def names() -> tuple[str, ...]:
    """Names of all strategies that need no ground truth, `default` not among them."""
    _load()
    return tuple(REGISTRY)


def find(name: str) -> Strategy:
    """The strategy called `name` (`default` is `DEFAULT`). Raises ValueError that lists the known ones."""
    _load()
    try:
        return REGISTRY[DEFAULT if name == "default" else name]
    except KeyError:
        raise ValueError(f"There is no strategy {name!r}. Choose one of: default, {', '.join(REGISTRY)}.") from None
