"""Quality and speed of a model over a task, with intervals."""
