"""The version of the package. Knows nothing else of it."""

__version__ = "0.1.0"
