"""A model with its exits: the adapter, its answers, and the folder that it is saved in."""
