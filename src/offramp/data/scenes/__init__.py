"""The procedural world of the tiny models: scenes, images, captions, questions."""
