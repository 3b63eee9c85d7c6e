"""Decoder layers that choose among experts."""
