"""Early exits for frozen Hugging Face vision-language models that really skip layers."""

__version__ = "0.1.0"
