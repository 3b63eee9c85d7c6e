"""The photo model: a small VLM on real photographs, put together from two packages' weights."""
