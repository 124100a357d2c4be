"""Methods on logits."""
