"""Files and the Hub: what lies there, how it is packed, how it becomes modules."""
