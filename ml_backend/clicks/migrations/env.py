"""Run by Alembic: migrates over the connection, and in the transaction, that `schema.migrate` opened."""

from __future__ import annotations

from alembic import context

from ml_backend.clicks.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table="clicks_version",
    render_as_batch=True,
)
context.run_migrations()
