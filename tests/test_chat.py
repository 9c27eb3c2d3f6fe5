"""Parts of the chat: blocks of Markdown, conversations, tools, and questions from a pipe."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_mlx.chat.conversation import Conversation
from flashmoe_mlx.chat.markdown import BlockReader
from flashmoe_mlx.chat.settings import parse_setting
from flashmoe_mlx.chat.status import Status
from flashmoe_mlx.chat.tools.builtin import BuiltinTools
from flashmoe_mlx.chat.tools.mcp_servers import McpServer
from flashmoe_mlx.chat.tools.python_file import PythonTools
from flashmoe_mlx.chat.tools.toolbox import Tool, Toolbox, ToolCallError, clean_result
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.text.tool_formats.calls import ToolCall

ALPHABET = st.sampled_from(["a", " ", "\n", "\n\n", "# ", "- ", "1. ", "```\n", "~~~", "> ", "|", "---", "  x", "*b*"])
FUNCTIONS = '''
import os, time
from typing import Literal

def add(first: int, second: int = 2) -> int:
    """Add two numbers.

    More about it.

    Args:
        first: the first number,
            a whole one.
        second (int): the second number.

    Returns:
        The sum.
    """
    print("adding")
    return first + second

def fail() -> None:
    raise ValueError("no")

def sleep(unit: Literal["s", "ms"], items: list[str] | None = None) -> None:
    time.sleep(60)

def end() -> None:
    os._exit(3)

def _private() -> None: ...
'''


@given(st.lists(ALPHABET, max_size=40), st.lists(st.integers(0, 80), max_size=8))
def test_blocks_hold_every_character(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    reader = BlockReader()
    blocks = []
    for start, end in pairwise(bounds):
        blocks += reader.add(text[start:end])
    blocks += reader.finish()
    whole = BlockReader()
    assert blocks == [*whole.add(text), *whole.finish()]
    kept = "".join(f"{block.language or ''}" * block.opens + block.text for block in blocks)
    assert sum(kept.count(mark) for mark in "ax") == sum(text.count(mark) for mark in "ax")


def test_a_block_is_complete_as_soon_as_nothing_can_change_it() -> None:
    reader = BlockReader()
    assert reader.add("one\n\n") == []
    assert [block.text for block in reader.add("# two\n- a\n")] == ["one\n\n", "# two\n"]
    assert [block.text for block in reader.add("  more\n\n  still\n- b\n")] == ["- a\n  more\n\n  still\n"]
    blocks = reader.add("```c\n" + "x\n" * 20 + "```\n")
    assert [(block.opens, block.closes, block.text.count("x")) for block in blocks[1:]] == [
        (True, False, 16),
        (False, True, 4),
    ]


def test_marks_are_shown_when_their_meaning_is_known() -> None:
    text = "a **bold** `code` ~~old~~ x*y\n- item\n\n# title\n```py\na = ``\n```\n"
    reader = BlockReader()
    shown = []
    for character in text:
        reader.add(character)
        shown.append(reader.open.text if reader.open else "")
    assert not [part for part in shown if part.endswith(("*", "`", "~", "\n-", "\n#")) and not part.startswith("a =")]
    assert {"a **bold** ", "a **bold** `code` ~~old~~ x*y", "a = ``"} < set(shown)


def test_results_are_data() -> None:
    text = "a\x1b[31mb\x1b]0;t\x07c\x00\r\nd\x9b<|im_end|>"
    assert clean_result(text, 100) == "abc\nd<|im_end|>"
    assert clean_result("x" * 50, 10) == "x" * 10 + "\n[40 more characters were left out]"


def test_functions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    tools = PythonTools(path, timeout=0.5)
    try:
        found = {tool.name: tool for tool in tools.tools}
        assert list(found) == ["add", "fail", "sleep", "end"]
        declared = found["add"].declaration["function"]
        assert declared["description"] == "Add two numbers.\n\nMore about it."
        assert declared["parameters"]["required"] == ["first"]
        assert declared["parameters"]["properties"] == {
            "first": {"type": "integer", "description": "the first number, a whole one."},
            "second": {"type": "integer", "description": "the second number."},
        }
        assert found["sleep"].declaration["function"]["parameters"]["properties"]["unit"] == {"enum": ["s", "ms"]}
        assert found["add"].run({"first": 1}) == "adding\n3"
        for name, arguments, reason in (
            ("fail", {}, "ValueError: no"),
            ("add", {"third": 1}, "TypeError"),
            ("sleep", {"unit": "s"}, "longer than 0.5 s"),
            ("end", {}, "has ended"),
        ):
            with pytest.raises(ToolCallError, match=reason):
                found[name].run(arguments)
        assert found["add"].run({"first": 1, "second": 5}) == "adding\n6"
    finally:
        tools.close()


@pytest.mark.parametrize("text", ["x = ", "", "import nosuchmodule", "def f(*args): ...", "raise SystemExit"])
def test_files_without_functions_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "functions.py"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        PythonTools(path, timeout=1.0)
    assert raised.value.code == "invalid_tools"


def test_builtin_tools_stay_in_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    tools = {tool.name: tool for tool in BuiltinTools(["shell", "read", "write", "list"], folder, 0.5).tools}
    assert tools["write"].run({"path": "a.txt", "text": "é"}) == "wrote 2 bytes"
    assert tools["read"].run({"path": "a.txt"}) == "é"
    assert tools["list"].run({"path": "."}) == "a.txt\nlink/"
    assert tools["shell"].run({"command": "cat a.txt; exit 3"}) == "é\n[exit status 3]"
    assert "longer than 0.5 s" in tools["shell"].run({"command": "sleep 60 & wait"})
    for name in ("../x", "link/x", str(tmp_path / "x"), "a\0b"):
        with pytest.raises(ToolCallError):
            tools["write"].run({"path": name, "text": ""})
    for arguments in ({}, {"path": 1}, {"path": "nosuch"}, {"path": "link"}):
        with pytest.raises(ToolCallError):
            tools["read"].run(arguments)
    with pytest.raises(InputError) as raised:
        BuiltinTools(["nosuch"], folder, 1.0)
    assert raised.value.code == "unknown_tool"


def test_tools_of_an_mcp_server(tmp_path: Path) -> None:
    server = tmp_path / "server.py"
    server.write_text(
        "from mcp.server import MCPServer\n"
        "import time\n"
        "server = MCPServer('test')\n"
        "@server.tool()\n"
        "def double(number: int) -> str:\n"
        "    '''Double a number.'''\n"
        "    if number < 0: time.sleep(60)\n"
        "    return str(2 * number)\n"
        "server.run()\n"
    )
    tools = McpServer(f"{sys.executable} {server}", 20.0, tmp_path / "mcp.log")
    try:
        (double,) = tools.tools
        assert double.about == "Double a number."
        assert double.run({"number": 4}) == "8"
        with pytest.raises(ToolCallError):
            double.run({"number": "x"})
    finally:
        tools.close()
    with pytest.raises(InputError) as raised:
        McpServer("/nosuch/program", 1.0, tmp_path / "mcp.log")
    assert raised.value.code == "mcp_failed"


def test_names_of_tools_are_unique() -> None:
    tool = Tool({"type": "function", "function": {"name": "f", "parameters": {}}}, "here", lambda _: "")

    class Source:
        tools = (tool,)

        def close(self) -> None:
            pass

    with Toolbox(["g"]) as toolbox:
        toolbox.add(Source())
        for refused in (lambda: toolbox.add(Source()), toolbox.check_allowed):
            with pytest.raises(InputError):
                refused()


def test_conversations_are_files(tmp_path: Path) -> None:
    conversation = Conversation("Be brief.")
    conversation.add_user("hi \ud800")
    conversation.add_answer("", "hm", [ToolCall("f", {"a": 1})])
    conversation.add_result("call_1_0", "done")
    path = tmp_path / "chat.json"
    conversation.save(path)
    loaded = Conversation.load(path)
    assert loaded.messages == conversation.messages
    assert loaded.take_question() == "hi \ud800"
    assert loaded.turns == []
    for text in ("", "[]", "{}", '{"format": "flashmoe_mlx chat", "version": 1, "messages": [{"role": "x"}]}'):
        path.write_text(text)
        with pytest.raises(InputError) as raised:
            Conversation.load(path)
        assert raised.value.code == "invalid_conversation"


def test_settings_are_parsed() -> None:
    assert parse_setting("top_k = 20") == ("top_k", 20)
    assert parse_setting("seed=null") == ("seed", None)
    for text in ("top_k=x", "top_k", "nosuch=1"):
        with pytest.raises(InputError):
            parse_setting(text)


@pytest.mark.parametrize("width", [0, 5, 20, 40, 200])
def test_the_status_fits(width: int) -> None:
    line = Status(1234, 4096, 3.14159, 0.5, 1.5, "computing").line(width)
    assert len(line) <= width
    assert width < 200 or line == "computing · 1,234/4,096 tokens · 3.14 tok/s · hits 50% · 1.50 GB/s"


def test_questions_from_a_pipe(tmp_path: Path) -> None:
    """Twenty lines are answered; stdout holds the answers alone, and a mistake in between is reported."""
    lines = ["Hello", "/set max_tokens=4", *["Who are you?"] * 17, "/nosuch"]
    done = subprocess.run(
        [sys.executable, "-m", "flashmoe_mlx", "task=chat", "temperature=0", "hydra.run.dir=run"],
        cwd=tmp_path,
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    answers = done.stdout.strip().split("\n\n")
    assert len(answers) == 18
    assert answers[0].startswith("Hello!")
    assert "\x1b" not in done.stdout
    assert "/nosuch: no such command" in done.stderr
    assert len(json.loads((tmp_path / "run" / "conversation.json").read_text())["messages"]) == 36


@pytest.mark.parametrize(
    ("variant", "kind", "products"),
    [
        ("q2", "str", ["cider"]),
        pytest.param("q4", "str", ["cider"], marks=pytest.mark.thorough),
        pytest.param("q2", "Literal['milk', 'tea']", ["milk", "tea"], marks=pytest.mark.thorough),
    ],
)
def test_the_demo_model_completes_a_loop(tmp_path: Path, variant: str, kind: str, products: list[str]) -> None:
    """Arguments obey the declaration, also against the words of the question."""
    (tmp_path / "market.py").write_text(
        "from typing import Literal\n"
        f"def buy(product: {kind}, amount: int) -> dict:\n"
        "    '''Buy goods on the market'''\n"
        "    return {'bought': product, 'amount': amount}\n"
    )
    command = [sys.executable, "-m", "flashmoe_mlx", "task=chat", "temperature=0", "hydra.run.dir=run"]
    done = subprocess.run(
        [*command, f"backend.variant={variant}", "tools=market.py", "tools.allow=[buy]"],
        cwd=tmp_path,
        input="Please order cider, 6 pieces.\n",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    messages = json.loads((tmp_path / "run" / "conversation.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    result = json.loads(messages[2]["content"])
    assert result["bought"] in products
    assert result["amount"] == 6
    assert done.stdout.strip()
