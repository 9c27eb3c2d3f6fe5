"""A server whose model writes what a script says: only the logits are scripted, all else is the real stack.

The model is tiny, has random weights and the tokenizer and chat template of the demo model, and computes the prompts of
agents, of 20,000 tokens and more, in seconds. The script of a request depends on its rendered prompt: it calls the
agent's tool for reading a file, and once the file's content is in the prompt, answers with it.
"""

import json
import re
import shlex
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.generation.logits import Scores, TokenHistory
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.made_models import synthetic
from flashmoe_mlx.made_models.demo import demo_folder
from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes
from flashmoe_mlx.server.listen import HttpServer, listening_socket
from flashmoe_mlx.server.middleware import Policy
from flashmoe_mlx.server.service import Service, Settings

SECRET = re.compile(r"The password is ([a-z]+-[0-9]+)")
"""The content of the file that agents read."""
_SIZES = SyntheticSizes(
    num_layers=2,
    hidden_size=128,
    num_experts=8,
    experts_per_token=1,
    expert_size=64,
    shared_expert_size=64,
    num_heads=1,
    num_kv_heads=1,
    head_dim=64,
    linear_key_heads=1,
    linear_value_heads=1,
    linear_key_dim=64,
    linear_value_dim=64,
    max_context=262_144,
    bits=4,
    seed=0,
)
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def read_call(tools: Sequence[dict[str, Any]], path: Path) -> tuple[str, str, str] | None:
    """Return the tool that reads ``path``: its name, a parameter and its value; None if there is none."""
    known = {
        "Read": ("file_path", str(path)),
        "read": ("filePath", str(path)),
        "read_file": ("file_path", str(path)),
        "exec_command": ("cmd", f"cat {shlex.quote(str(path))}"),
        "shell_command": ("command", f"cat {shlex.quote(str(path))}"),
        "shell": ("command", json.dumps(["cat", str(path)])),
    }
    names = [tool.get("function", tool)["name"] for tool in tools]
    return next(((name, *known[name]) for name in names if name in known), None)


def script(prompt: str, tools: Sequence[dict[str, Any]], path: Path) -> str:
    """Return what the model writes after ``prompt``."""
    thinking = "I read the file first.\n</think>\n\n" if prompt.endswith("<think>\n") else ""
    found = SECRET.findall(prompt)
    call = read_call(tools, path)
    if found:
        return f"{thinking}The file says that the password is {found[-1]}."
    if call is None:
        return f"{thinking}Reading a file"
    name, parameter, value = call
    body = f"<function={name}>\n<parameter={parameter}>\n{value}\n</parameter>\n</function>"
    return f"{thinking}I will look at it.\n\n<tool_call>\n{body}\n</tool_call>"


class Scripted:
    """A logits processor that makes the next token of a script by far the most likely one."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def __call__(self, scores: Scores, history: TokenHistory) -> Scores:
        """Return the scores f64 [vocabulary] with the script's next token ahead."""
        done = int(history.generated.sum())
        if done >= len(self._tokens):  # a grammar has forced other tokens
            return scores
        forced: Scores = np.where(np.arange(len(scores)) == self._tokens[done], 1e4, scores)
        return forced


def load_scripted(folder: Path, path: Path) -> Engine:
    """Load a tiny model that reads ``path``; ``folder`` keeps the model."""
    demo = demo_folder()

    def copy_tokenizer(target: Path) -> int:
        for name in _FILES:
            shutil.copyfile(demo / name, target / name)
        size: int = json.loads((demo / "config.json").read_text())["vocab_size"]
        return size

    with mock.patch.object(synthetic, "write_byte_tokenizer", copy_tokenizer):
        pack = synthetic.synthetic_pack("scripted", _SIZES, folder)
    engine = load(pack.folder)
    real = engine.request

    def request(prompt: Any, **options: Any) -> Request:
        made = real(prompt, **options)
        tokenizer = engine.tokenizer
        text = script(tokenizer.decode(made.prompt_ids), options.get("tools") or [], path)
        if options.get("schema"):  # of the title of a conversation
            text = '{"title": "Reading a file"}'
        tokens = [*tokenizer.encode(text), min(made.stop_ids)]
        return replace(made, processors=(*made.processors, Scripted(tokens)))

    vars(engine)["request"] = request
    return engine


@contextmanager
def scripted_server(folder: Path, path: Path, port: int = 0) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Serve the scripted model; give the port, and the measurements of requests as they end."""
    records: list[dict[str, Any]] = []
    listener = listening_socket("127.0.0.1", port)
    service = Service(lambda: load_scripted(folder, path), Settings("scripted", record=records.append))
    server = HttpServer(service, Policy(), stop_seconds=2)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(listener, ready.set), daemon=True)
    thread.start()
    if not ready.wait(120):
        raise RuntimeError("the scripted model does not load")
    try:
        yield listener.getsockname()[1], records
    finally:
        server.stop()
        thread.join(30)
