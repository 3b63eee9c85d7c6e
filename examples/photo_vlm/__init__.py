"""A small VLM on real photographs, made of SmolLM2-135M and EfficientNet-lite0."""
