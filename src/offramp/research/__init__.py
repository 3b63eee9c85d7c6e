"""What compares, analyses, benchmarks and reports. A production process never imports it."""
