"""Folders that vLLM and other servers read, written from an adapter."""
