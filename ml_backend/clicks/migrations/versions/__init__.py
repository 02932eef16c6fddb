"""Alembic migrations of the click log."""
