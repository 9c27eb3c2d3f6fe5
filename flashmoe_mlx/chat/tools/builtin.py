"""Built-in tools: a shell in a folder, and files in that folder."""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flashmoe_mlx.chat.tools.toolbox import Tool, ToolCallError, declared
from flashmoe_mlx.errors import InputError

NAMES = ("shell", "read", "write", "list")
_BLOCK = 2**16
_MOST_ENTRIES = 1000
_MOST_BYTES = 2**20
"""Number of bytes of a file or of the output of a command that are read; the model gets a part of them."""
_TEXT = {"type": "string"}


class BuiltinTools:
    """The built-in tools ``names``, which work in ``folder``.

    Files are confined to the folder; commands of the shell are not.

    Args:
        names: names from ``NAMES``.
        folder: the folder.
        timeout: the largest number of seconds that a command of the shell may take.

    Raises:
        InputError: there is no such tool (code "unknown_tool") or no such folder (code "not_a_folder").
    """

    def __init__(self, names: Sequence[str], folder: Path, timeout: float) -> None:
        for name in names:
            if name not in NAMES:
                raise InputError(
                    f"tools.builtin: no tool is named {name!r}; choose from {', '.join(NAMES)}", code="unknown_tool"
                )
        if names and not folder.is_dir():
            raise InputError(f"tools.folder={folder}: is not a folder", code="not_a_folder")
        self._folder = folder.resolve()
        self._timeout = timeout
        offered: Mapping[str, tuple[str, Mapping[str, Any], Callable[[Mapping[str, Any]], str]]] = {
            "shell": ("Run a command in a shell and return its output.", {"command": _TEXT}, self._shell),
            "read": ("Return the text of a file.", {"path": _TEXT}, self._read),
            "write": ("Replace the text of a file, or make a new file.", {"path": _TEXT, "text": _TEXT}, self._write),
            "list": ("List the files in a folder; '.' is the working folder.", {"path": _TEXT}, self._list),
        }
        self.tools: list[Tool] = [
            Tool(
                declared(name, about, {"type": "object", "properties": parameters, "required": list(parameters)}),
                f"built in, in {self._folder}",
                run,
            )
            for name, (about, parameters, run) in offered.items()
            if name in names
        ]

    def close(self) -> None:
        """Do nothing: every command has ended with its call."""

    def _shell(self, arguments: Mapping[str, Any]) -> str:
        command = _text(arguments, "command")
        process = subprocess.Popen(  # noqa: S602  # the tool is a shell, behind consent
            command,
            shell=True,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, complete = self._output(process)
        finally:
            _end(process)
        text = output.decode(errors="replace")
        if not complete:
            return f"{text}\n[stopped: it took longer than {self._timeout:g} s]"
        return f"{text}\n[exit status {process.returncode}]" if process.returncode or not text else text

    def _output(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bool]:
        """Return the first bytes of the output, and whether the command ended in time; discard the rest."""
        deadline = time.monotonic() + self._timeout
        kept = bytearray()
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector, process.stdout as stream:
            selector.register(stream, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                if not selector.select(left):
                    continue
                block = os.read(stream.fileno(), _BLOCK)
                if not block:
                    break
                kept += block[: _MOST_BYTES - len(kept)]
            else:
                return bytes(kept), False
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return bytes(kept), False
        return bytes(kept), True

    def _read(self, arguments: Mapping[str, Any]) -> str:
        path = self._inside(_text(arguments, "path"))
        with _failures(path):
            if not path.is_file():
                raise ToolCallError(f"{path.name}: no such file")
            with path.open("rb") as file:
                return file.read(_MOST_BYTES).decode(errors="replace")

    def _write(self, arguments: Mapping[str, Any]) -> str:
        path, text = self._inside(_text(arguments, "path")), _text(arguments, "text")
        with _failures(path):
            if path.exists() and not path.is_file():
                raise ToolCallError(f"{path.name}: is not a file")
            path.write_text(text, encoding="utf-8")
        return f"wrote {len(text.encode()):,} bytes"

    def _list(self, arguments: Mapping[str, Any]) -> str:
        path = self._inside(str(arguments.get("path") or "."))
        with _failures(path):
            entries = sorted(path.iterdir())
            names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries[:_MOST_ENTRIES]]
        more = len(entries) - len(names)
        return "\n".join([*names, *([f"[{more} more]"] if more else [])]) or "[no files]"

    def _inside(self, name: str) -> Path:
        """Return the path ``name`` in the folder, with symbolic links resolved."""
        try:
            path = (self._folder / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise ToolCallError(f"{name[:80]!r}: {error}") from error
        if not path.is_relative_to(self._folder):
            raise ToolCallError(f"{name}: is outside the folder that this tool may use")
        return path


@contextmanager
def _failures(path: Path) -> Iterator[None]:
    """Convert errors of the system to failures of the call."""
    try:
        yield
    except OSError as error:
        raise ToolCallError(f"{path.name}: {error.strerror}") from error


def _text(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise ToolCallError(f"the argument {name!r} must be text")
    return value


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all processes that it started."""
    with suppress(ProcessLookupError, PermissionError):  # they ended before
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
