"""Teachers: what they are, who answers, when, and where their weights are."""
