"""First tables of the click log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "annotation_events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("event", sa.String(length=32), nullable=False),
        sa.Column("action", sa.String(length=32), nullable=False),
        sa.Column("annotation", sa.BigInteger(), nullable=False),
        sa.Column("project", sa.BigInteger(), nullable=True),
        sa.Column("task", sa.BigInteger(), nullable=True),
        sa.Column("user_id", sa.BigInteger(), nullable=True),
        sa.Column("lead_time", sa.Float(precision=53), nullable=True),
        sa.Column("cancelled", sa.Boolean(), nullable=True),
        sa.Column("received", sa.Float(precision=53), nullable=False),
        sa.Column("updated_at", sa.String(length=64), nullable=True),
        sa.Column("regions", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("event"),
    )
    op.create_table(
        "objects",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("session", sa.String(length=255), nullable=False),
        sa.Column("project", sa.BigInteger(), nullable=False),
        sa.Column("task", sa.BigInteger(), nullable=False),
        sa.Column("mask_id", sa.String(length=64), nullable=False),
        sa.Column("image", sa.Text(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("arm", sa.String(length=8), nullable=False),
        sa.Column("arm_mode", sa.String(length=8), nullable=False),
        sa.Column("arm_unit", sa.String(length=16), nullable=False),
        sa.Column("arm_seed", sa.BigInteger(), nullable=False),
        sa.Column("strategy", sa.String(length=64), nullable=True),
        sa.Column("model_version", sa.String(length=255), nullable=True),
        sa.Column("head", sa.String(length=255), nullable=True),
        sa.Column("label", sa.Text(), nullable=True),
        sa.Column("user_email", sa.Text(), nullable=True),
        sa.Column("user_id", sa.BigInteger(), nullable=True),
        sa.Column("started", sa.Float(precision=53), nullable=False),
        sa.Column("last", sa.Float(precision=53), nullable=True),
        sa.Column("clicks", sa.Integer(), nullable=True),
        sa.Column("seconds", sa.Float(precision=53), nullable=True),
        sa.Column("region", sa.Text(), nullable=True),
        sa.Column("proposal_control", sa.String(length=255), nullable=True),
        sa.Column("accepted", sa.Float(precision=53), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=True),
        sa.Column("annotation", sa.BigInteger(), nullable=True),
        sa.Column("annotated", sa.String(length=64), nullable=True),
        sa.Column("lead_time", sa.Float(precision=53), nullable=True),
        sa.Column("final_area", sa.Integer(), nullable=True),
        sa.Column("final_predicted_iou", sa.Float(precision=53), nullable=True),
        sa.Column("last_iou", sa.Float(precision=53), nullable=True),
        sa.Column("clicks_85", sa.Integer(), nullable=True),
        sa.Column("seconds_85", sa.Float(precision=53), nullable=True),
        sa.Column("clicks_90", sa.Integer(), nullable=True),
        sa.Column("seconds_90", sa.Float(precision=53), nullable=True),
        sa.Column("clicks_95", sa.Integer(), nullable=True),
        sa.Column("seconds_95", sa.Float(precision=53), nullable=True),
        sa.Column("stale", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("session"),
    )
    op.create_index("objects_by_annotation", "objects", ["annotation"], unique=False)
    op.create_index("objects_by_stale", "objects", ["stale"], unique=False)
    op.create_index("objects_by_start", "objects", ["started"], unique=False)
    op.create_index("objects_by_task", "objects", ["project", "task", "mask_id"], unique=False)
    op.create_table(
        "final_masks",
        sa.Column("object", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("rle", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["object"], ["objects.id"]),
        sa.PrimaryKeyConstraint("object"),
    )
    op.create_table(
        "answers",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("event", sa.String(length=32), nullable=False),
        sa.Column("object", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("received", sa.Float(precision=53), nullable=False),
        sa.Column("answered", sa.Float(precision=53), nullable=False),
        sa.Column("prompts", sa.Text(), nullable=False),
        sa.Column("proposal_x", sa.Float(precision=53), nullable=True),
        sa.Column("proposal_y", sa.Float(precision=53), nullable=True),
        sa.Column("proposal_positive", sa.Boolean(), nullable=True),
        sa.Column("proposal_score", sa.Float(precision=53), nullable=True),
        sa.Column("proposal_strategy", sa.String(length=64), nullable=True),
        sa.Column("proposal_shown", sa.Boolean(), nullable=False),
        sa.Column("radius_px", sa.Float(precision=53), nullable=False),
        sa.Column("stopped", sa.Text(), nullable=True),
        sa.Column("strategy", sa.String(length=64), nullable=True),
        sa.Column("model_version", sa.String(length=255), nullable=True),
        sa.Column("head", sa.String(length=255), nullable=True),
        sa.Column("predicted_iou", sa.Float(precision=53), nullable=True),
        sa.Column("area", sa.Integer(), nullable=True),
        sa.Column("changed_px", sa.Integer(), nullable=True),
        sa.Column("iou_to_final", sa.Float(precision=53), nullable=True),
        sa.Column("queue_ms", sa.Float(precision=53), nullable=True),
        sa.Column("encode_ms", sa.Float(precision=53), nullable=True),
        sa.Column("decode_ms", sa.Float(precision=53), nullable=True),
        sa.Column("timings", sa.Text(), nullable=True),
        sa.Column("user_email", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["object"],
            ["objects.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("event"),
    )
    op.create_index("answers_by_object", "answers", ["object", "received"], unique=False)
    op.create_table(
        "recoveries",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("object", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("annotation", sa.BigInteger(), nullable=False),
        sa.Column("result_sha256", sa.String(length=64), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due", sa.Float(precision=53), nullable=False),
        sa.Column("finished", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(
            ["object"],
            ["objects.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("object", "annotation", "result_sha256", name="one_recovery_per_state"),
    )
    op.create_table(
        "clicks",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("object", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("click", sa.Integer(), nullable=False),
        sa.Column("prompt", sa.String(length=64), nullable=False),
        sa.Column("answer", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("time", sa.Float(precision=53), nullable=False),
        sa.Column("think_s", sa.Float(precision=53), nullable=True),
        sa.Column("x", sa.Float(precision=53), nullable=False),
        sa.Column("y", sa.Float(precision=53), nullable=False),
        sa.Column("positive", sa.Boolean(), nullable=False),
        sa.Column("from_x", sa.Float(precision=53), nullable=True),
        sa.Column("from_y", sa.Float(precision=53), nullable=True),
        sa.Column("origin", sa.String(length=9), nullable=False),
        sa.Column("proposal_x", sa.Float(precision=53), nullable=True),
        sa.Column("proposal_y", sa.Float(precision=53), nullable=True),
        sa.Column("proposal_positive", sa.Boolean(), nullable=True),
        sa.Column("proposal_score", sa.Float(precision=53), nullable=True),
        sa.Column("proposal_shown", sa.Boolean(), nullable=False),
        sa.Column("distance_px", sa.Float(precision=53), nullable=True),
        sa.Column("followed", sa.Boolean(), nullable=True),
        sa.Column("sign_matched", sa.Boolean(), nullable=True),
        sa.Column("strategy", sa.String(length=64), nullable=True),
        sa.Column("model_version", sa.String(length=255), nullable=True),
        sa.Column("predicted_iou", sa.Float(precision=53), nullable=True),
        sa.Column("area", sa.Integer(), nullable=True),
        sa.Column("changed_px", sa.Integer(), nullable=True),
        sa.Column("iou_to_final", sa.Float(precision=53), nullable=True),
        sa.Column("delta_iou", sa.Float(precision=53), nullable=True),
        sa.Column("answer_ms", sa.Float(precision=53), nullable=True),
        sa.Column("queue_ms", sa.Float(precision=53), nullable=True),
        sa.Column("encode_ms", sa.Float(precision=53), nullable=True),
        sa.Column("decode_ms", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(
            ["answer"],
            ["answers.id"],
        ),
        sa.ForeignKeyConstraint(
            ["object"],
            ["objects.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("clicks_by_object", "clicks", ["object", "seq"], unique=False)
    op.create_table(
        "masks",
        sa.Column("answer", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("rle", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["answer"],
            ["answers.id"],
        ),
        sa.PrimaryKeyConstraint("answer"),
    )


def downgrade() -> None:
    """Remove them, with everything in them."""
    for table in ("recoveries", "masks", "final_masks", "clicks", "answers", "annotation_events", "objects"):
        op.drop_table(table)
