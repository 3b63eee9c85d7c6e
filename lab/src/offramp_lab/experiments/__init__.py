"""What is measured: comparison of methods, speed."""
