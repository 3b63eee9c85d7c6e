"""The one decoder: sequences, what decides about their tokens, and the loop that moves them on."""
