"""What experiments are made on: tiny families, shapes with random weights, corrupted pictures."""
