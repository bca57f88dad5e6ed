"""An OpenAI-compatible server: many clients, one decoder.

The decoder runs in the process's main thread, HTTP in another one; between them go
choices (what a client wants), and pieces (what a round said of it).

Importing this imports nothing else; see ``__main__`` for the command.
"""
