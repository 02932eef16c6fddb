"""Tables of the click log, the engine they live in, and bringing an older database up to date.

`answers` and `annotation_events` are what happened. `clicks` and most of `objects` are derived from them and can be
made again. Times are seconds since 1970 (UTC), positions pixels of the original image. docs/click-log.md explains every
field.
"""

from __future__ import annotations

import logging
from functools import partial
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    text,
)
from sqlalchemy.engine import make_url

BigId = BigInteger().with_variant(Integer, "sqlite")
Double = Float(53)

metadata = MetaData()
_migrating = Lock()

objects = Table(
    "objects",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("session", String(255), nullable=False, unique=True),
    Column("project", BigInteger, nullable=False),
    Column("task", BigInteger, nullable=False),
    Column("mask_id", String(64), nullable=False),
    Column("image", Text, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("arm", String(8), nullable=False),
    Column("arm_mode", String(8), nullable=False),
    Column("arm_unit", String(16), nullable=False),
    Column("arm_seed", BigInteger, nullable=False),
    Column("strategy", String(64)),
    Column("model_version", String(255)),
    Column("head", String(255)),
    Column("label", Text),
    Column("user_email", Text),
    Column("user_id", BigInteger),
    Column("started", Double, nullable=False),
    Column("last", Double),
    Column("clicks", Integer),
    Column("seconds", Double),
    Column("region", Text),
    Column("proposal_control", String(255)),
    Column("accepted", Double),
    Column("outcome", String(16)),
    Column("annotation", BigInteger),
    Column("annotated", String(64)),
    Column("lead_time", Double),
    Column("final_area", Integer),
    Column("final_predicted_iou", Double),
    Column("last_iou", Double),
    *(
        Column(f"{what}_{percent}", kind)
        for percent in (85, 90, 95)
        for what, kind in (("clicks", Integer), ("seconds", Double))
    ),
    Column("stale", Boolean, nullable=False, default=True),
    Index("objects_by_task", "project", "task", "mask_id"),
    Index("objects_by_annotation", "annotation"),
    Index("objects_by_start", "started"),
    Index("objects_by_stale", "stale"),
)

answers = Table(
    "answers",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("event", String(32), nullable=False, unique=True),
    Column("object", BigId, ForeignKey("objects.id"), nullable=False),
    Column("received", Double, nullable=False),
    Column("answered", Double, nullable=False),
    Column("prompts", Text, nullable=False),
    Column("proposal_x", Double),
    Column("proposal_y", Double),
    Column("proposal_positive", Boolean),
    Column("proposal_score", Double),
    Column("proposal_strategy", String(64)),
    Column("proposal_shown", Boolean, nullable=False),
    Column("radius_px", Double, nullable=False),
    Column("stopped", Text),
    Column("strategy", String(64)),
    Column("model_version", String(255)),
    Column("head", String(255)),
    Column("predicted_iou", Double),
    Column("area", Integer),
    Column("changed_px", Integer),
    Column("iou_to_final", Double),
    Column("queue_ms", Double),
    Column("encode_ms", Double),
    Column("decode_ms", Double),
    Column("timings", Text),
    Column("user_email", Text),
    Column("error", Text),
    Index("answers_by_object", "object", "received"),
)

#: Apart from `answers`, so that reports do not read through the masks, and so that masks can be thrown away.
masks = Table(
    "masks",
    metadata,
    Column("answer", BigId, ForeignKey("answers.id"), primary_key=True),
    Column("rle", LargeBinary, nullable=False),
)

#: The mask of each object as it was submitted.
final_masks = Table(
    "final_masks",
    metadata,
    Column("object", BigId, ForeignKey("objects.id"), primary_key=True),
    Column("rle", LargeBinary, nullable=False),
)

clicks = Table(
    "clicks",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("object", BigId, ForeignKey("objects.id"), nullable=False),
    Column("seq", Integer, nullable=False),
    Column("kind", String(8), nullable=False),
    Column("click", Integer, nullable=False),
    Column("prompt", String(64), nullable=False),
    Column("answer", BigId, ForeignKey("answers.id")),
    Column("time", Double, nullable=False),
    Column("think_s", Double),
    Column("x", Double, nullable=False),
    Column("y", Double, nullable=False),
    Column("positive", Boolean, nullable=False),
    Column("x1", Double),
    Column("y1", Double),
    Column("from_x", Double),
    Column("from_y", Double),
    Column("origin", String(9), nullable=False),
    Column("proposal_x", Double),
    Column("proposal_y", Double),
    Column("proposal_positive", Boolean),
    Column("proposal_score", Double),
    Column("proposal_shown", Boolean, nullable=False),
    Column("distance_px", Double),
    Column("followed", Boolean),
    Column("sign_matched", Boolean),
    Column("strategy", String(64)),
    Column("model_version", String(255)),
    Column("predicted_iou", Double),
    Column("area", Integer),
    Column("changed_px", Integer),
    Column("iou_to_final", Double),
    Column("delta_iou", Double),
    Column("answer_ms", Double),
    Column("queue_ms", Double),
    Column("encode_ms", Double),
    Column("decode_ms", Double),
    Index("clicks_by_object", "object", "seq"),
)

annotation_events = Table(
    "annotation_events",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("event", String(32), nullable=False, unique=True),
    Column("action", String(32), nullable=False),
    Column("annotation", BigInteger, nullable=False),
    Column("project", BigInteger),
    Column("task", BigInteger),
    Column("user_id", BigInteger),
    Column("lead_time", Double),
    Column("cancelled", Boolean),
    Column("received", Double, nullable=False),
    Column("updated_at", String(64)),
    Column("regions", Integer),
)

recoveries = Table(
    "recoveries",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("object", BigId, ForeignKey("objects.id"), nullable=False),
    Column("annotation", BigInteger, nullable=False),
    Column("result_sha256", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("reason", Text),
    Column("attempts", Integer, nullable=False, default=0),
    Column("due", Double, nullable=False),
    Column("finished", Double),
    UniqueConstraint("object", "annotation", "result_sha256", name="one_recovery_per_state"),
)


def make_engine(url: str | None, data_dir: Path, *, cache_mb: int = 64) -> Engine:
    """Engine of the click log: the URL's, or SQLite in `data_dir/clicks.sqlite`.

    `cache_mb`: what each connection to SQLite keeps of the file at most, megabytes.
    Raises ValueError, in words, for a URL that SQLAlchemy cannot read or whose driver is not installed.
    """
    if url is None:
        data_dir.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{data_dir / 'clicks.sqlite'}"
    try:
        parsed = make_url(url)
        if parsed.drivername in {"postgresql", "postgres"}:
            parsed = parsed.set(drivername="postgresql+psycopg")
        sqlite = parsed.get_backend_name() == "sqlite"
        arguments: dict[str, Any] = {"timeout": 30.0} if sqlite else {"connect_timeout": 5}
        engine = create_engine(parsed, connect_args=arguments, pool_pre_ping=not sqlite)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The click log's database needs the package {error.name}: pip install '{error.name}'."
        ) from error
    except Exception as error:
        raise ValueError(
            f"BALD_SAM_CLICKS_URL is not a database URL such as postgresql://user@host/name: {error}"
        ) from error
    if sqlite:
        event.listen(engine, "connect", partial(_configure_sqlite, cache_mb))
    return engine


def migrate(engine: Engine, revision: str = "head") -> None:
    """Create the tables, or bring them to this version. Several processes may do this at once: one works, others wait.

    `revision`: of the migrations, to stop at; the newest unless an older database is to be made.
    Raises sqlalchemy.exc.OperationalError if the database cannot be reached.
    """
    from alembic import command
    from alembic.config import Config

    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(files("ml_backend.clicks") / "migrations"))
    config.set_main_option("path_separator", "os")
    # Alembic's context is one for the whole process.
    with _migrating, engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.execute(text("SELECT pg_advisory_xact_lock(7041776)"))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        connection.commit()


def _configure_sqlite(cache_mb: int, connection: Any, _record: Any) -> None:
    # WAL: reports read while clicks are written. FULL: a journal segment is deleted only when its rows are on the disk.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"cache_size={-1024 * cache_mb}"):
        connection.execute(f"PRAGMA {pragma}")
