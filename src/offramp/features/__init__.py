"""What attaches to the core, one file a feature."""
