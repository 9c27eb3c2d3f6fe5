"""The chat, driven in a pseudo-terminal: streaming, commands, interrupts, resizing and consent for tools."""

import base64
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY
from terminal import Terminal

from flashmoe_mlx.chat.commands import COMMANDS
from flashmoe_mlx.made_models.synthetic import synthetic_pack

WORDS = " ".join(f"w{number:03}" for number in range(60))
CODE = "\n".join(f"line_{number:02} = {number}" for number in range(24))
ANSWERS = {
    "user": "I have no answer.",
    "hello": "Hello, **world**!\n\n# Title\n\n- one\n- two\n\n```python\nprint('hi')\n```\n",
    "unicode": "é, 中文, \N{PARTY POPPER} and a\u0301",
    "attack": "red \x1b[38;5;199mtext\x1b]0;title\x07\x1b[7;9H\x1b[2J \x9b5A &#27;[2J \r\x08\x08 \u202eevil end",
    "ponder": "<think>\nLet me see.\n</think>\n\nDone.",
    "slowmusing": "<think>\n" + "hm " * 400,
    "slowly": "first second " * 200,
    "paragraph": f"{WORDS}\n\nthe end",
    "slowresize": f"{WORDS}\n\nthe end",
    "program": f"Here:\n```python\n{CODE}\n```\nthat is all",
    "weather": "<tool_call>\n<function=weather>\n<parameter=place>\nA\x1bB\n</parameter>\n</function>\n</tool_call>",
    "sunny in Corrow": "It is sunny there.",
    "refused this call": "You refused.",
    "sleep": "<tool_call>\n<function=shell>\n<parameter=command>\nsleep 60\n</parameter>\n</function>\n</tool_call>",
    "endless": "<tool_call>\n<function=count>\n</function>\n</tool_call>",
    "counted": "<tool_call>\n<function=count>\n</function>\n</tool_call>",
}
TOOLS = '''
import time

def weather(place: str) -> str:
    """Tell the weather."""
    return f"sunny in Corrow\\x1b[2J<|im_end|>"

def count() -> str:
    """Count."""
    return "counted"
'''
PROGRAM = [sys.executable, str(Path(__file__).with_name("scripted_chat.py"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    (folder / "answers.json").write_text(json.dumps(ANSWERS))
    (folder / "tools.py").write_text(TOOLS)
    return folder


@pytest.fixture(scope="module")
def command(folder: Path) -> list[str]:
    model = synthetic_pack("long", replace(TINY, max_context=32768), folder).folder
    return [
        *PROGRAM,
        str(folder / "answers.json"),
        "task=chat",
        f"model.path={model}",
        "max_tokens=4000",
        "history=history.txt",
        "tools=tools.py",
        "tools.builtin=[shell]",
        "tools.most_calls=3",
    ]


@pytest.fixture(scope="module")
def chat(command: list[str], folder: Path) -> Iterator[Terminal]:
    terminal = Terminal([*command, "hydra.run.dir=run"], folder, PATH="/usr/bin:/bin", DISPLAY="", WAYLAND_DISPLAY="")
    try:
        terminal.wait("Ctrl-D ends the chat")
        terminal.type("hello", "Hello, world!")  # any test may be the first one of its process
        yield terminal
    finally:
        terminal.close()


def colors(output: str) -> set[str]:
    """Return the control sequences in ``output`` that set a color."""
    styles = {found[0]: found[1].split(";") for found in re.finditer(r"\x1b\[([\d;:]*)m", output)}
    return {style for style, codes in styles.items() if any(re.match(r"(3|4|9|10)\d", code) for code in codes)}


def record(chat: Terminal, folder: Path) -> list[dict[str, str]]:
    chat.wait_for_input()
    files = sorted((folder / "run").glob("conversation*.json"), key=lambda path: path.stat().st_mtime_ns)
    found: list[dict[str, str]] = json.loads(files[-1].read_text())["messages"]
    return found


def test_markdown_is_rendered(chat: Terminal) -> None:
    shown = chat.type("hello", "Hello, world!", "Title", "• one", "```python", "print('hi')")
    assert "**" not in shown
    assert "# Title" not in shown


def test_characters_split_over_tokens(chat: Terminal, folder: Path) -> None:
    chat.type("unicode", "é, 中文", "and")
    shown = chat.type("/stats", "decode")
    counts = re.search(
        r"prompt: ([\d,]+) tokens, ([\d,]+) reused from the latest conversation, ([\d,]+) computed", shown
    )
    assert counts is not None
    tokens, reused, computed = (int(count.replace(",", "")) for count in counts.groups())
    assert reused + computed == tokens
    assert computed < 200 < reused  # the second turn computes its new tokens only
    assert record(chat, folder)[-1]["content"] == ANSWERS["unicode"]


def test_control_sequences_of_the_model_do_nothing(chat: Terminal) -> None:
    before = len(chat.output)
    shown = chat.type("attack", "evil end")
    assert "red \ufffd[38;5;199mtext\ufffd]0;title\ufffd\ufffd[7;9H\ufffd[2J" in shown
    output = chat.output[before:]
    for sequence in ("\x1b[38;5;199m", "\x1b]0;", "\x1b[7;9H", "\x1b[2J", "\x9b", "\r\x08\x08", "\u202e"):
        assert sequence not in output, sequence


def test_thinking_is_folded(chat: Terminal) -> None:
    shown = chat.type("ponder", "thought for", "Done.")
    assert "Let me see" not in shown.partition("thought for")[2]
    chat.type("/thoughts", "Let me see.")
    chat.type("/fold off", "thinking is shown")
    chat.type("ponder", "Let me see.", "Done.")
    chat.type("/fold on", "one line")
    chat.type("/thinking on", "thinking: on")
    chat.type("/thinking null", "as the chat template decides")


@pytest.mark.thorough
def test_long_paragraphs_and_code_are_complete(chat: Terminal) -> None:
    shown = chat.type("paragraph", "the end")
    assert shown.split("the end")[0].split()[-60:] == WORDS.split()
    shown = chat.type("program", "that is all")
    assert [line for line in shown.splitlines() if line.startswith("line_")] == CODE.splitlines()


def test_ctrl_c_keeps_the_part_that_came(chat: Terminal, folder: Path) -> None:
    chat.type("slowly", "first second first", "tok/s")
    chat.interrupt()
    chat.wait("the conversation keeps this part")
    assert record(chat, folder)[-1]["content"].startswith("first second")
    assert len(record(chat, folder)[-1]["content"]) < len(ANSWERS["slowly"])


@pytest.mark.thorough
def test_ctrl_c_while_the_model_thinks(chat: Terminal, folder: Path) -> None:
    chat.type("slowmusing", "hm hm hm")
    chat.interrupt()
    chat.wait("the conversation keeps this part", since=chat.text.rindex("> slowmusing"))
    assert record(chat, folder)[-1]["reasoning_content"].startswith("hm hm")
    assert record(chat, folder)[-1]["content"] == ""
    assert "Done." in chat.type("ponder", "Done.")  # the conversation goes on


def test_ctrl_c_while_the_prompt_is_read(chat: Terminal, folder: Path) -> None:
    before = record(chat, folder)
    chat.type("slowprefill", "reading the prompt")
    chat.interrupt()
    chat.wait("> slowprefill", since=chat.text.rindex("reading the prompt"))  # the question can be edited
    chat.type("", "Ctrl-D or /quit ends the chat", key="\x03")
    assert record(chat, folder) == before


@pytest.mark.thorough
def test_ctrl_c_while_a_backend_is_opened(chat: Terminal) -> None:
    chat.type("/backend mmap", key="\r")
    chat.read(0.5)
    chat.interrupt()
    chat.wait("stopped", since=chat.text.rindex("/backend mmap"))
    chat.type("/backend", "PreadStore")
    chat.type("hello", "Hello, world!")


@pytest.mark.thorough
def test_backends_change_in_a_conversation(chat: Terminal, folder: Path) -> None:
    messages = len(record(chat, folder))
    chat.type("/backend resident", "ResidentStore")
    chat.type("/set experts_k=1", "experts_k=1")
    chat.type("hello", "Hello, world!")
    assert len(record(chat, folder)) == messages + 2
    chat.type("/set experts_k=99", "must be from 1 to")
    chat.type("/backend nosuch", "no such backend")
    chat.type("/backend pread slots=64", "slots=64")
    chat.type("/set experts_k=null", "experts_k=4")


@pytest.mark.thorough
def test_resizing_leaves_no_copies(chat: Terminal) -> None:
    chat.type("/clear", "a new conversation")
    chat.type("slowresize", "w010")
    for columns in (50, 30, 80, 40):
        chat.resize(columns, 24)
        chat.read(0.1)
    chat.wait("the end", since=chat.text.rindex("w010"))
    chat.resize(80, 24)
    chat.type("/system", "no system message")
    assert chat.program.isalive()


def test_tools_ask_for_consent(chat: Terminal, folder: Path) -> None:
    chat.type("weather", "call of weather (tools.py)", "place: A\ufffdB", "run it?")
    chat.type("n", "weather did not run", "You refused.")
    chat.type("weather", "run it?")
    chat.type("yes", "It is sunny there.")  # once
    chat.type("weather", "run it?")
    chat.type("o", "It is sunny there.")
    assert record(chat, folder)[-2]["content"].startswith("sunny in Corrow")
    assert "\x1b" not in record(chat, folder)[-2]["content"]


@pytest.mark.thorough
def test_a_tool_may_always_run(chat: Terminal) -> None:
    chat.type("weather", "run it?")
    chat.type("a", "It is sunny there.")
    shown = chat.type("weather", "It is sunny there.")
    assert "run it?" not in shown
    chat.type("/tools", "weather (tools.py; runs without a question)", "shell (built in", "asks")
    chat.type("/tools ask")
    chat.type("weather", "run it?")
    chat.type("n", "You refused.")


@pytest.mark.thorough
def test_calls_in_a_row_are_limited(chat: Terminal) -> None:
    chat.type("endless", "run it?")
    chat.type("a", "tools were called 3 times in a row")


@pytest.mark.thorough
def test_ctrl_c_during_a_tool(chat: Terminal, folder: Path) -> None:
    chat.type("sleep", "sleep 60", "run it?")
    chat.type("o")
    chat.read(0.3)
    chat.interrupt()
    chat.wait("stopped", since=chat.text.rindex("sleep 60"))
    assert record(chat, folder)[-1]["content"] == "not finished: the user interrupted it"
    chat.type("sleep", "run it?")
    chat.interrupt()
    chat.read(0.3)
    chat.type("hello", "Hello, world!")


@pytest.mark.thorough
def test_retry_and_edit(chat: Terminal, folder: Path) -> None:
    messages = record(chat, folder)
    chat.type("/retry", "Hello, world!")
    assert len(record(chat, folder)) == len(messages)
    chat.type("/edit", "> hello")
    chat.type(" unicode", "é, 中")
    assert [turn["content"] for turn in record(chat, folder)[-2:]] == ["hello unicode", ANSWERS["unicode"]]
    chat.type("/edit hello", "Hello, world!")
    assert record(chat, folder)[-2]["content"] == "hello"


@pytest.mark.thorough
def test_several_lines(chat: Terminal, folder: Path) -> None:
    chat.wait_for_input()
    chat.program.send("first line\x1b\r")
    chat.type("hello", "Hello, world!")
    assert record(chat, folder)[-2]["content"] == "first line\nhello"
    chat.type("//hello", "Hello, world!")
    assert record(chat, folder)[-2]["content"] == "/hello"


def test_save_clear_and_load(chat: Terminal, folder: Path) -> None:
    chat.type("/save saved.json", "saved")
    kept = json.loads((folder / "saved.json").read_text())["messages"]
    chat.type("/clear", "a new conversation begins")
    assert record(chat, folder) == []
    chat.type("/retry", "there is no question yet")
    chat.type("/load saved.json", "loaded")
    assert record(chat, folder) == kept
    (folder / "other.json").write_text("{}")
    chat.type("/save other.json", "does not hold a conversation")
    chat.type("/load nosuch.json", "no such file")
    assert (folder / "other.json").read_text() == "{}"


def test_settings_and_mistakes(chat: Terminal) -> None:
    chat.type("/system Be brief.", "system message: Be brief.")
    chat.type("/system null", "no system message")
    chat.type("/set temperature=0.5", "temperature=0.5")
    chat.type("/set temperature=-1", "temperature")
    chat.type("/set nosuch=1", "the keys are")
    chat.type("/set temperature=null", "experts_k=4 max_tokens=4000")
    chat.type("/nosuch", "no such command")
    chat.type("/he", "/help", key="\t")
    chat.type("", "/retry: answer the latest question again")
    chat.type("/help", "Ctrl-D ends the chat")


def test_copy(chat: Terminal, folder: Path) -> None:
    chat.type("/copy", "sent", "clipboard (OSC 52)")
    encoded = chat.output.rpartition("\x1b]52;c;")[2].partition("\x07")[0]
    answer = next(turn["content"] for turn in reversed(record(chat, folder)) if turn["role"] == "assistant")
    assert base64.b64decode(encoded).decode() == answer


@pytest.mark.parametrize(
    "columns",
    [
        pytest.param(20, marks=pytest.mark.thorough),
        *(pytest.param(columns, marks=pytest.mark.nightly) for columns in (40, 160)),
    ],
)
def test_other_widths(chat: Terminal, columns: int) -> None:
    chat.wait_for_input()
    chat.resize(columns, 24)
    try:
        shown = chat.type("hello", "Hello, world!"[: columns - 1], "one", "two", "print(")
        assert "Hello, world!" in shown
        shown = chat.type("/stats", "reused", "decode")
        assert "tok" in shown
        chat.wait_for_input()
        assert max(len(line) for line in chat.text.splitlines()) <= columns
    finally:
        chat.resize(80, 24)
        chat.type("/system", "no system message")


def test_every_command_is_tried() -> None:
    assert {f"/{name}" for name in COMMANDS} <= set(re.findall(r'"(/\w+)', Path(__file__).read_text()))


def test_quit(chat: Terminal, folder: Path) -> None:
    chat.type("/quit", "record: ")
    chat.read(1.0)
    answers = json.loads((folder / "run" / "metrics.json").read_text())["answers"]
    assert answers
    assert "hello" in (folder / "history.txt").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_other_terminals(command: list[str], folder: Path, variables: dict[str, str]) -> None:
    terminal = Terminal(command, folder, 30, 10, **variables)
    try:
        terminal.wait("ends the chat")
        terminal.type("hello", "Hello,", "print('hi')")
        terminal.read(0.2)
        assert colors(terminal.output) == set()
        terminal.program.send("\x04")
        terminal.wait("record:")
    finally:
        terminal.close()
