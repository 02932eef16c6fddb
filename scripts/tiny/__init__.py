"""Training of the shipped backbone `tiny`; the entry is scripts/train_tiny.py."""
