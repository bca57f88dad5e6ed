"""Anthropic's Messages: its bodies as those of a chat, and answers in its form."""
