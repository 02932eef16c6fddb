"""Where the image of a task is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_backend.errors import RequestError
from ml_backend.labeling_config import LabelingConfig
from worker.contract import ImageRef


def image_of(task: Mapping[str, Any], config: LabelingConfig, project: int | None, page: int | None = None) -> ImageRef:
    """The image that the config's image control shows of a task; `page` of a list of images.

    Raises RequestError, naming the field, where the task has none.
    """
    value: Any = task.get("data")
    for part in [config.key] if isinstance(value, dict) and config.key in value else config.key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, list):
        value = value[page or 0] if (page or 0) < len(value) else None
    if not isinstance(value, str) or not value:
        raise RequestError(
            f"The task has no image address in `data.{config.key}`.",
            f"The labelling config reads `${config.key}`; the task's data must have a field of this name.",
        )
    task_id = task.get("id")
    return ImageRef(url=value, task=task_id if isinstance(task_id, int) else None, project=project)
