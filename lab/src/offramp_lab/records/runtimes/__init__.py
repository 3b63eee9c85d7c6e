"""Exits inside llama.cpp and in PyTorch, against runtimes without exits, on the photo model."""
