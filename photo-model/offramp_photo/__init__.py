"""Weights and card of offramp's photo model, and a picture to try it on. Data, no code."""
