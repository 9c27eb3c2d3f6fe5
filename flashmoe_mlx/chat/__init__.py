"""Chat in a terminal: a conversation with a loaded model, its commands, and tools that the model may call."""

from importlib.util import find_spec

from flashmoe_mlx.errors import missing_extra

if find_spec("prompt_toolkit") is None:
    raise missing_extra("task=chat", "chat")
