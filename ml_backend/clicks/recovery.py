"""Putting back the mask that Label Studio drops when an annotation is submitted before the mask was accepted.

The writer notes in `recoveries`, in the transaction of the webhook, that prompts of an object were saved without its
mask. This thread then adds the mask through Label Studio's API, unless the annotation was edited since.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sqlalchemy import Engine, or_, select, update

from ml_backend.clicks.derive import in_order, read_prompts
from ml_backend.clicks.events import result_digest, unpack_rle
from ml_backend.clicks.schema import answers, masks, objects, recoveries
from ml_backend.clicks.store import PENDING, fetch

log = logging.getLogger(__name__)

RESTORED, SKIPPED, FAILED = "restored", "skipped", "failed"

#: Seconds before each further attempt when Label Studio does not answer; after the last one it is given up.
RETRY_AFTER_S = (2.0, 10.0, 60.0, 600.0)
#: How often due attempts are looked for without being woken.
LOOK_EVERY_S = 5.0
#: A claim of a process that died is free again after this time.
CLAIM_S = 60.0


class AnnotationApi(Protocol):
    """What recovery needs of Label Studio."""

    def get(self, annotation: int) -> list[dict[str, Any]] | None:
        """The result of an annotation, None if it is gone."""

    def set(self, annotation: int, result: Sequence[Mapping[str, Any]]) -> None:
        """Replace the result of an annotation."""


class LabelStudioAnnotations:
    """The API of a Label Studio, with either kind of its tokens."""

    def __init__(self, url: str, api_key: str) -> None:
        self._url, self._api_key = url, api_key
        self._made: Any = None

    def get(self, annotation: int) -> list[dict[str, Any]] | None:
        """See AnnotationApi."""
        from label_studio_sdk.core.api_error import ApiError

        try:
            return self._annotations.get(id=annotation, request_options={"timeout_in_seconds": 20}).result or []
        except ApiError as error:
            if error.status_code == 404:
                return None
            raise

    def set(self, annotation: int, result: Sequence[Mapping[str, Any]]) -> None:
        """See AnnotationApi."""
        self._annotations.update(
            id=annotation, result=[dict(region) for region in result], request_options={"timeout_in_seconds": 20}
        )

    @property
    def _annotations(self) -> Any:
        if self._made is None:  # the SDK takes seconds to import: not before it is needed
            import label_studio_sdk

            make: Any = label_studio_sdk.LabelStudio
            self._made = make(base_url=self._url, api_key=self._api_key)
        return self._made.annotations


class Recovery:
    """Does what is pending in `recoveries`, in a thread of its own. Several processes may run one each."""

    def __init__(self, engine: Engine, api: AnnotationApi) -> None:
        self._engine, self._api = engine, api
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="click-recovery", daemon=True)
        self._thread.start()

    def wake(self, _engine: Engine | None = None) -> None:
        """Something may be pending."""
        self._wake.set()

    def close(self) -> None:
        """Stop after the attempt in progress; what is pending stays so."""
        self._stop.set()
        self._wake.set()
        self._thread.join(5)

    def _run(self) -> None:
        while True:
            self._wake.wait(LOOK_EVERY_S)
            self._wake.clear()
            if self._stop.is_set():
                return
            try:
                recover_due(self._engine, self._api)
            except Exception as error:  # the database is away or has no tables yet: they stay pending
                log.debug("Pending recoveries cannot be read: %s", error)


def recover_due(engine: Engine, api: AnnotationApi) -> None:
    """Attempt every recovery that is due, once."""
    now = time.time()
    # None is put off for longer than that: the clock was set back.
    due = or_(recoveries.c.due <= now, recoveries.c.due > now + CLAIM_S + max(RETRY_AFTER_S))
    pending = select(recoveries).where(recoveries.c.status == PENDING, due)
    with engine.connect() as connection:
        found = fetch(connection, pending.order_by(recoveries.c.id))
    for row in found:
        mine = recoveries.c.id == row["id"]
        claim = update(recoveries).where(mine, recoveries.c.attempts == row["attempts"], recoveries.c.status == PENDING)
        with engine.begin() as connection:
            claimed = connection.execute(claim.values(attempts=row["attempts"] + 1, due=time.time() + CLAIM_S))
        if not claimed.rowcount:
            continue  # another process does it
        values: dict[str, Any]
        try:
            status, reason = restore(engine, api, row)
            values = {"status": status, "reason": reason, "finished": time.time()}
        except Exception as error:
            more = row["attempts"] < len(RETRY_AFTER_S)
            log.warning("The mask lost from annotation %d could not be put back: %s", row["annotation"], error)
            values = {"reason": str(error)[:1000], "status": PENDING if more else FAILED}
            values["due"] = time.time() + (RETRY_AFTER_S[row["attempts"]] if more else 0)
        with engine.begin() as connection:
            connection.execute(update(recoveries).where(mine).values(values))


def restore(engine: Engine, api: AnnotationApi, row: Mapping[str, Any]) -> tuple[str, str]:
    """Add the last answered mask of an object to an annotation, and take its prompts and proposals out.

    `row` is of `recoveries`. Returns (status, why). Touches nothing if the annotation is not as the webhook told it.
    """
    annotation = row["annotation"]
    with engine.connect() as connection:
        thing = fetch(connection, select(objects).where(objects.c.id == row["object"]))[0]
        found = in_order(fetch(connection, select(answers).where(answers.c.object == row["object"])))
        shown = [answer["id"] for answer in found if answer["error"] is None]
        blob = connection.scalar(select(masks.c.rle).where(masks.c.answer == shown[-1])) if shown else None
    if blob is None or thing["region"] is None:
        return SKIPPED, "No mask was answered for this object."
    result = api.get(annotation)
    if result is None:
        return SKIPPED, "The annotation was deleted."
    if any(str(region.get("id")) == thing["mask_id"] for region in result):
        return SKIPPED, "The annotation has the mask."
    if result_digest(result) != row["result_sha256"]:
        return SKIPPED, "The annotation was edited since."
    prompts = {prompt.id for answer in found for prompt in read_prompts(answer)}
    region = json.loads(thing["region"])
    region["value"]["rle"] = list(unpack_rle(blob))
    kept = [one for one in result if str(one.get("id")) not in prompts and not _is_proposal(one, thing)]
    api.set(annotation, [*kept, region])
    removed = len(result) - len(kept)
    reason = f"Mask {thing['mask_id']} was put back, {removed} leftover prompts and proposals removed."
    log.info("Annotation %d of task %d: %s", annotation, thing["task"], reason)
    return RESTORED, reason


def _is_proposal(region: Mapping[str, Any], thing: Mapping[str, Any]) -> bool:
    control = thing["proposal_control"]
    return control is not None and region.get("from_name") == control and "rle" not in (region.get("value") or {})
