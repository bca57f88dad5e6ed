"""Which matrices of a model are multiplied by this package's kernel, and why.

The user's machine decides: the kernel is taken where it was right and faster there.
"""
