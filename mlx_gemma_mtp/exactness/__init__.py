"""Whether rounds with drafts give the bytes of plain decoding on this machine."""
