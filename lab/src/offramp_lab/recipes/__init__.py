"""How the tiny models that ship were made, and commands for FREE's own data sets."""
