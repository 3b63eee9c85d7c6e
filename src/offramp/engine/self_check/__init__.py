"""Whether a backbone decodes with exits as it does without: the self-check's part that runs."""
