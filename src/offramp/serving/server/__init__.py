"""OpenAI's API over a batch engine; needs the extra `serve`."""
