"""What comes from a folder or from the hub."""
