"""Models and data sets outside the package, with what exits are worth on them."""
