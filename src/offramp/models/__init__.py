"""The frozen backbone, what is attached to it, and what goes into it."""

JUDGED = ("token", "sequence")
"""What a discriminator gives a verdict on. Here, since the command line offers it without torch."""
