"""The scripts that make the records, a module for each; run with `python -m`."""
