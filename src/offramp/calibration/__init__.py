"""Thresholds with a guarantee, and what decoding by them costs."""
