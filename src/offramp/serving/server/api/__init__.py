"""What clients send and get: requests, generation options, text, answers."""
