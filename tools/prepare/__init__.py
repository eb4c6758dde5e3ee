"""Public sets of problems -> the project's JSONL (`prepare_data.py`)."""
