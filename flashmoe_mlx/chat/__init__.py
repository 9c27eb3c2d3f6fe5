"""Chat in a terminal: a conversation with a loaded model, its commands, and tools that the model may call."""

from importlib.util import find_spec

from flashmoe_mlx.errors import InputError

if find_spec("prompt_toolkit") is None:
    raise InputError(
        "task=chat needs the package prompt_toolkit: pip install 'flashmoe_mlx[chat]'", code="missing_extra"
    )
