"""What experiments are made on: tiny families, corrupted pictures."""
