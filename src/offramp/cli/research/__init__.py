"""Commands of `offramp.research`, which is imported when one of them is run."""
