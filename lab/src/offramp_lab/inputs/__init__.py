"""What experiments are made on: tiny families, pictures that look alike."""
