"""What surrounds every algorithm, and no paper mentions."""
from common.tokenizer import InputError

__all__ = ["InputError", "load"]


def __getattr__(name):
    """`from common import load`, imported when asked for: `python -m common.hf` must come first."""
    if name == "load":
        from common.checkpoint import load
        return load
    raise AttributeError(name)
