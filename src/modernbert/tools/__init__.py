"""What tells of models and machines: speed, attention, attributions."""
