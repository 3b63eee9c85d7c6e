"""Where the decoder of any model is, found by watching it run, and checked against the model."""
