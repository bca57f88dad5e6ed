"""What the target hands a drafter, computed once for every text and kept on disk."""
