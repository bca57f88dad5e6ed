"""A target with its drafter: loaded, planned for, and what was learnt of both."""

from .pair import Pair, pair_of

__all__ = ["Pair", "pair_of"]
