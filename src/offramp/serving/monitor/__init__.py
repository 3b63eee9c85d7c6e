"""A guarantee that is watched while requests come in."""
