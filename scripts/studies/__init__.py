"""Studies: measured once, their results stand in docs."""
