"""The version of the package. Knows nothing else of it."""

__version__ = "0.2.0"
