"""Training exits: configuration, losses, labels, the loop, checkpoints."""
