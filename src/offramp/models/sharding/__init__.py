"""Models whose parts accelerate keeps on several devices, or on disk, and moves by hooks."""
