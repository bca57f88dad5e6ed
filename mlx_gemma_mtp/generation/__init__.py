"""Text in, text out: prompts, requests, stop strings, figures."""
