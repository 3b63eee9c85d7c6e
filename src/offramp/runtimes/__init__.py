"""Engines other than PyTorch that run a backbone with its exits."""
