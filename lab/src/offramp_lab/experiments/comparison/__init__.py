"""Training objectives and exit policies at equal quality."""
