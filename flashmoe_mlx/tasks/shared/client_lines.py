"""The lines that let well-known clients use a server; docs/serve.md explains them."""

_GUIDE = "https://flashmoe-mlx.github.io/flashmoe_mlx/serve/"


def client_lines(host: str, port: int, name: str, *, needs_key: bool) -> list[str]:
    """Return the lines to copy, for a server at ``host`` and ``port`` that serves the model ``name``."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    base = f"http://{reachable}:{port}"
    key = "<your key>" if needs_key else "x"
    header = f" -H 'Authorization: Bearer {key}'" if needs_key else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return [
        f"ready: {base}/v1 serves {name}",
        f"  OpenAI SDK, llm, lm-eval:  OPENAI_BASE_URL={base}/v1 OPENAI_API_KEY={key}",
        f"  Claude Code:  ANTHROPIC_BASE_URL={base} ANTHROPIC_AUTH_TOKEN={key} ANTHROPIC_MODEL={name} claude",
        f"  Codex, opencode, Qwen Code, Open WebUI:  base URL {base}/v1; configurations: {_GUIDE}",
        f"  try it:  curl {base}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{body}'",
        "stop with Ctrl-C",
    ]
