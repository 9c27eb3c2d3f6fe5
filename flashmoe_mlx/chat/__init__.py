"""Chat in a terminal: a conversation with a loaded model, its commands, and tools that the model may call."""
