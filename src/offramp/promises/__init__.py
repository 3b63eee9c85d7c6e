"""What is promised of an answer, under which conditions, and of which requests."""
