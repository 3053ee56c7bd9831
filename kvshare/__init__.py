"""kvshare: a vLLM worker arrives warm and leaves without loss."""

__version__ = "0.1.0"
