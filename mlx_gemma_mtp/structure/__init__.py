"""What a text is forced to be: a schema, a regular expression, a choice, a grammar."""
