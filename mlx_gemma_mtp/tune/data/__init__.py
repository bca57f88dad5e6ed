"""Data files to documents."""
