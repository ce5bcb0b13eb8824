"""What surrounds every algorithm, and no paper mentions."""
from common.tokenizer import InputError

__all__ = ["InputError", "load"]


def __getattr__(name):
    """`from common import load`, on first use: `python -m common.hf` may not import hf twice."""
    if name == "load":
        from common.checkpoint import load
        return load
    raise AttributeError(name)
