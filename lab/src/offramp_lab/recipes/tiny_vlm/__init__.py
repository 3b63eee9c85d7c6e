"""The two tiny models that ship with offramp: how they were made."""
