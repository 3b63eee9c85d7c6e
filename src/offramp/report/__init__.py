"""One HTML page that shows a run: answers, plots, tables."""
