"""The frozen backbone, what is attached to it, and what goes into it."""
