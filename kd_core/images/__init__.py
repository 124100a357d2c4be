"""Images: sources, views, batches, networks, evaluation."""
