"""What Gemma writes beside plain text: marks, thoughts, calls of tools."""
