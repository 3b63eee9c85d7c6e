"""Examples and images as prompts take them."""
