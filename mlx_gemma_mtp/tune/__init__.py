"""Adapts a drafter to the target that is actually run."""
