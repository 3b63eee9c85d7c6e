"""The photo model in many ways to answer, on the same photographs: one run, several records."""
