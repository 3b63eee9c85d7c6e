"""One generation: prefill, decoding steps, exit checks, the KV cache."""
