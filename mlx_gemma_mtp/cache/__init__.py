"""Keys and values: where they lie, what is seen of them, how they come in and out."""
