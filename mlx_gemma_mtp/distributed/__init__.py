"""Several processes as one: what ranks say to each other, and when one is missed."""
