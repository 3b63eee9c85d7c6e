"""Quality at every depth, and overthinking."""
