"""Routes that describe the server: models, tokens, health and metrics. None of them waits for the engine."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flashmoe_mlx.generation.prompting import render_prompt
from flashmoe_mlx.server.calls import read_fields, service_of
from flashmoe_mlx.server.chat_json import parse_conversation
from flashmoe_mlx.server.errors import ApiError
from flashmoe_mlx.server.lengths import LONGEST_COUNTED
from flashmoe_mlx.server.metrics import CONTENT_TYPE
from flashmoe_mlx.server.options import token_ids
from flashmoe_mlx.server.service import Service

_MOST_TOKENS = 2**20


def describe_model(service: Service, name: str) -> dict[str, Any]:
    """Return a model in a form that serves the APIs of OpenAI and of Anthropic.

    ``meta`` tells what a client may leave to the server: the sampling options, and the options of the chat template.
    """
    engine = service.engine
    context = engine.model.config.max_context
    template = engine.tokenizer.chat_template
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "flashmoe_mlx",
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(service.started, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": context,
        "max_model_len": context,
        "context_length": context,
        "meta": {
            "n_ctx_train": context,
            "sampling": asdict(engine.sampling.choose().options),
            "template_options": [] if template is None else sorted(template.variables),
        },
    }


async def list_models(request: Request) -> Response:
    """List the served names."""
    service = service_of(request)
    names = [service.settings.name, *service.settings.aliases]
    content = {
        "object": "list",
        "data": [describe_model(service, name) for name in names],
        "has_more": False,
        "first_id": names[0],
        "last_id": names[-1],
    }
    return JSONResponse(content)


async def get_model(request: Request) -> Response:
    """Describe one served name."""
    service = service_of(request)
    name = request.path_params["name"]
    if name not in (service.settings.name, *service.settings.aliases):
        raise ApiError(f"there is no model {name[:80]!r} here", status=404, code="model_not_found")
    return JSONResponse(describe_model(service, name))


async def tokenize(request: Request) -> Response:
    """Return the tokens of a text (``prompt`` or ``content``), or of ``messages``."""
    service, fields = service_of(request), await read_fields(request)
    engine = service.engine
    if "messages" in fields:
        conversation = parse_conversation(fields, engine)
        tokens = (await service.prepare(conversation)).request.prompt_ids
    else:
        text = fields.text("prompt" if "prompt" in fields else "content", LONGEST_COUNTED)
        if text is None:
            fields.refuse("prompt", "is required", code="missing_field")
        tokens = await service.outside(lambda: engine.tokenizer.encode(text))
    content: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": engine.model.config.max_context}
    if fields.flag("with_pieces"):
        content["tokens"] = [{"id": token, "piece": engine.tokenizer.decode([token])} for token in tokens]
    return JSONResponse(content)


async def detokenize(request: Request) -> Response:
    """Return the text of tokens."""
    service, fields = service_of(request), await read_fields(request)
    tokenizer = service.engine.tokenizer
    tokens = token_ids(fields, "tokens", service.engine, _MOST_TOKENS)
    if tokens is None:
        fields.refuse("tokens", "is required: a list of token ids", code="missing_field")
    text = await service.outside(lambda: tokenizer.decode(tokens))
    return JSONResponse({"prompt": text, "content": text})


async def tokenizer_info(request: Request) -> Response:
    """Describe the tokenizer, for evaluations that use it from afar."""
    tokenizer = service_of(request).engine.tokenizer
    ends = sorted(tokenizer.eos_token_ids)
    names = {token_id: text for text, token_id in tokenizer.added_tokens.items()}
    eos = next((names[token] for token in ends if token in names), None)
    template = tokenizer.chat_template
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "bos_token": None,
        "pad_token": eos,
        "chat_template": None if template is None else template.source,
    }
    return JSONResponse(content)


async def apply_template(request: Request) -> Response:
    """Return the prompt that a conversation is rendered to."""
    service, fields = service_of(request), await read_fields(request)
    engine = service.engine
    conversation = parse_conversation(fields, engine)
    names = ("enable_thinking", "template_options")
    options = {name: conversation.options[name] for name in names}
    template = engine.tokenizer.chat_template
    tools = conversation.tools or None
    text = await service.outside(lambda: render_prompt(conversation.messages, template, tools=tools, **options))
    return JSONResponse({"prompt": text})


async def health(request: Request) -> Response:
    """Return 200 if the model is ready."""
    _ = service_of(request).engine
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """Return the counters for Prometheus."""
    service = service_of(request)
    worker = service.worker
    store = None if worker.engine is None else worker.engine.store.stats()
    text = service.metrics.text(worker.waiting, worker.running, store)
    return Response(text, media_type=None, headers={"content-type": CONTENT_TYPE})
