"""A VLM on real photographs from two registry packages: SmolLM2-135M and EfficientNet-lite0."""
