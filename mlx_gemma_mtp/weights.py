"""``load_target`` and ``load_drafter`` under the path that programs know."""

from .checkpoints.weights import load_drafter, load_target

__all__ = ["load_drafter", "load_target"]
