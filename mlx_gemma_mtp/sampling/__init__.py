"""From logits to tokens: settings, distributions, noise, the accept rules."""
