"""Text: sources, tokenizers, packed rows, batches, models."""
