"""OpenAI's Responses: bodies as those of a chat, and answers in their form."""
