"""Commands of `offramp.research`."""
