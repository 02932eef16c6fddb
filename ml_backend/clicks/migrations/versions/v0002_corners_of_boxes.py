"""The second corner of a box, so that it is not taken for a click."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; objects that were begun with a box are derived again."""
    for name in ("x1", "y1"):
        op.add_column("clicks", sa.Column(name, sa.Float(precision=53), nullable=True))
    objects, answers = (
        sa.table("objects", sa.column("id"), sa.column("stale")),
        sa.table("answers", sa.column("object"), sa.column("prompts")),
    )
    with_box = sa.select(answers.c.object).where(answers.c.prompts.not_like('%"x1": null%'))
    op.execute(sa.update(objects).where(objects.c.id.in_(with_box)).values(stale=sa.true()))
