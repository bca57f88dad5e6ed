"""Rounds over a batch of sequences: token ids in, token ids out, one read a round."""
