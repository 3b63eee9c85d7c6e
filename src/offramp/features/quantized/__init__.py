"""Backbones whose weights are held in fewer bits: what exits beside them need."""
