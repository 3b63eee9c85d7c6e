"""Rows in slots: their tokens, their own rules, and the calls that move them on."""
