"""Tools that are functions of a Python file. They run in a process that can be stopped at any time."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from flashmoe_mlx.chat.tools.toolbox import Tool, ToolCallError
from flashmoe_mlx.errors import InputError

_WORKER = Path(__file__).with_name("python_worker.py")
_BLOCK = 2**20
_LARGEST_ANSWER = 64 * 2**20
_START_SECONDS = 60.0
_INVALID = "invalid_tools"


class PythonTools:
    """The public functions of the Python file at ``path``; making this object runs the file.

    The functions share one process, so that a module may keep state between calls. The process is started again after
    a call that took too long, was interrupted, or ended it.

    Args:
        path: the file.
        timeout: the largest number of seconds that a call may take.

    Raises:
        InputError: the file is missing, cannot be run, or has no functions; code "invalid_tools".
    """

    def __init__(self, path: Path, timeout: float) -> None:
        if path.suffix != ".py":
            raise InputError(
                f"tools={path}: must be a Python file (.py) with the functions that the model may call; "
                "a JSON file only declares functions, for task=generate",
                code=_INVALID,
            )
        if not path.is_file():
            raise InputError(f"tools={path}: no such file", code=_INVALID)
        self._path = path.resolve()
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        declarations = self._start()
        self.tools: list[Tool] = [
            Tool(declaration, str(path), partial(self._call, declaration["function"]["name"]))
            for declaration in declarations
        ]
        if not self.tools:
            self.close()
            raise InputError(f"tools={path}: has no public functions", code=_INVALID)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError, PermissionError):  # it ended before
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):  # unwritten bytes to a process that has ended
                        stream.close()

    def _start(self) -> list[dict[str, Any]]:
        """Start the process; return the declarations of the functions."""
        self._process = subprocess.Popen(  # noqa: S603  # a file that the user named
            [sys.executable, "-P", str(_WORKER), str(self._path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the call
        )
        try:
            answer = self._answer(self._process, _START_SECONDS)
        except (TimeoutError, EOFError):
            self.close()
            raise InputError(f"tools={self._path}: the file ended or did not finish", code=_INVALID) from None
        except BaseException:
            self.close()
            raise
        if "error" in answer:
            self.close()
            raise InputError(f"tools={self._path}: {' '.join(answer['error'].split())}", code=_INVALID)
        tools: list[dict[str, Any]] = answer["tools"]
        return tools

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        if self._process is None:
            try:
                self._start()
            except InputError as error:
                raise ToolCallError(str(error)) from error
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"name": name, "arguments": dict(arguments)}).encode() + b"\n")
            process.stdin.flush()
            answer = self._answer(process, self._timeout)
        except TimeoutError:
            self.close()
            raise ToolCallError(f"stopped: it took longer than {self._timeout:g} s") from None
        except (EOFError, OSError):
            self.close()
            raise ToolCallError("the process that runs the functions has ended") from None
        except BaseException:
            self.close()
            raise
        if "error" in answer:
            raise ToolCallError(answer["error"])
        return str(answer["result"])

    def _answer(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        """Read one line of JSON.

        Raises:
            TimeoutError: it does not come within ``seconds``.
            EOFError: the process has ended, or the line is too long.
        """
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise TimeoutError
                block = os.read(process.stdout.fileno(), _BLOCK)
                received += block
                if not block or len(received) > _LARGEST_ANSWER:
                    raise EOFError
        answer: dict[str, Any] = json.loads(received)
        return answer
