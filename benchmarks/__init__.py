"""Scripts that make the records, and the tables and plots that show them; run with `python -m`."""
