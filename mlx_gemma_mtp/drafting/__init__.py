"""How many drafts the next round has: models of cost and acceptance, and their use."""
