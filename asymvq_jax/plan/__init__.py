"""What a training step will need on chips that are not here: memory, FLOPs, traffic, the least time it can take."""
