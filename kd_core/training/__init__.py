"""One run in this process."""
