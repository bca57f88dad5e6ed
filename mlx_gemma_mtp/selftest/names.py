"""What sections are called, in their order. Knows no libraries."""

MACHINE = "machine"
MODEL = "model"
SECTIONS = (MACHINE, MODEL, "kernels", "slabs", "exactness", "rows", "costs")
