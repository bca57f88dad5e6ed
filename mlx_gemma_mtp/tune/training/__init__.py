"""The training loop, its loss and its optimizers."""
