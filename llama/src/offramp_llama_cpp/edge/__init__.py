"""Sliced files without PyTorch: numpy, llama.cpp and its libmtmd, templates by Jinja."""
