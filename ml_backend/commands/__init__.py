"""The commands of `bald-sam`, one a file; `ml_backend.cli` puts them together."""
