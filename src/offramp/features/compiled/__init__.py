"""Decoder layers called one after the other, without what a framework prepares around them."""
