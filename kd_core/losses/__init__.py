"""Losses: per row, gradients to the student only."""
