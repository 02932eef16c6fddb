"""The image of a task: where it may be fetched from, its bytes, its pixels."""
