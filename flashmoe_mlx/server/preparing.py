"""From a conversation to a request for the engine."""

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.server.answer import Prepared
from flashmoe_mlx.server.conversation import Conversation
from flashmoe_mlx.server.lengths import refuse_long, texts_of
from flashmoe_mlx.text.tool_calls import ToolCallReader


def prepare(conversation: Conversation, engine: Engine) -> Prepared:
    """Render and tokenize ``conversation``, and check its options.

    Raises:
        InputError: the template refuses the messages, an option is wrong, or the prompt exceeds the context.
    """
    tools = conversation.tools or None
    refuse_long(texts_of(conversation.messages), engine)
    request = engine.request(conversation.messages, tools=tools, **conversation.options)
    reader = ToolCallReader(tools, engine.tokenizer.added_tokens, engine.tool_format) if tools else None
    return Prepared(request, reader)
