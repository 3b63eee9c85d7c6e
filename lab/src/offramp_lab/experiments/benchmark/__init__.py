"""Speed of forced exits on real shapes, and of other ways to decode."""
