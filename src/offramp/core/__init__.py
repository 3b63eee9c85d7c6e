"""What every answer runs: the decoding loop, and backbone, exits, prompts and caches around it."""
