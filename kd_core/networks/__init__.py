"""What looks into or changes a network, whatever the modality."""
