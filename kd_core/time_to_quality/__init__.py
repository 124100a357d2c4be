"""Does distillation pay: runs against runs."""
