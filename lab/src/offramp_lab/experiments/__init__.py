"""What is measured: analysis by depth, comparison of methods, speed."""
