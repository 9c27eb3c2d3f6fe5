"""Tools of MCP servers that are started as processes and speak over stdin and stdout.

Source of the protocol: https://modelcontextprotocol.io; the ``mcp`` package implements it.
"""

import asyncio
import shlex
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from flashmoe_mlx.chat.tools.toolbox import Tool, ToolCallError, declared
from flashmoe_mlx.errors import InputError, missing_extra

if TYPE_CHECKING:
    from mcp import Client

_START_SECONDS = 60.0
_END_SECONDS = 10.0
_FAILED = "mcp_failed"
Result = TypeVar("Result")


class McpServer:
    """The tools of one MCP server, which is started with ``command``.

    Args:
        command: the command line of the server.
        timeout: the largest number of seconds that a call may take.
        log: file for what the server writes to stderr.

    Raises:
        InputError: the package ``mcp`` is missing (code "missing_extra"), or the server cannot be started or does not
            answer (code "mcp_failed").
    """

    def __init__(self, command: str, timeout: float, log: Path) -> None:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise InputError(f"tools.mcp: {command!r}: {error}", code=_FAILED) from None
        if not words:
            raise InputError("tools.mcp: a command is empty", code=_FAILED)
        try:
            import mcp  # noqa: F401
        except ImportError:
            raise missing_extra("tools.mcp", "mcp") from None
        self._command = command
        self._timeout = timeout
        self._log = log.open("a")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True)
        self._thread.start()
        self._stop = asyncio.Event()
        self._client: Client | None = None
        self._ready: Future[None] = Future()
        self._served = asyncio.run_coroutine_threadsafe(self._serve(words, self._log), self._loop)
        try:
            self._ready.result(_START_SECONDS)
            self.tools: list[Tool] = self._wait(self._list(), _START_SECONDS)
        except Exception as error:
            self.close()
            raise InputError(
                f"tools.mcp: {command}: cannot be used ({_reason(error)}); its own messages are in {log}", code=_FAILED
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the server."""
        self._loop.call_soon_threadsafe(self._stop.set)
        try:
            self._served.result(_END_SECONDS)
        except Exception:
            self._served.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_END_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()
        self._log.close()

    async def _serve(self, words: list[str], log: TextIO) -> None:
        """Keep the connection open until ``_stop`` is set; its context must begin and end in one task."""
        from mcp import Client, StdioServerParameters, stdio_client

        try:
            transport = stdio_client(StdioServerParameters(command=words[0], args=words[1:]), errlog=log)
            async with Client(transport) as client:
                self._client = client
                self._ready.set_result(None)
                await self._stop.wait()
        except Exception as error:
            if not self._ready.done():
                self._ready.set_exception(error)

    async def _list(self) -> list[Tool]:
        assert self._client is not None
        tools: list[Tool] = []
        cursor: str | None = None
        while True:
            page = await self._client.list_tools(cursor=cursor)
            tools += [
                Tool(
                    declared(tool.name, tool.description or "", tool.input_schema),
                    f"MCP server {self._command}",
                    partial(self._call, tool.name),
                )
                for tool in page.tools
            ]
            cursor = page.next_cursor
            if not cursor:
                return tools

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        assert self._client is not None
        try:
            result = self._wait(self._client.call_tool(name, dict(arguments)), self._timeout)
        except TimeoutError:
            raise ToolCallError(f"stopped: it took longer than {self._timeout:g} s") from None
        except (Exception, CancelledError) as error:
            raise ToolCallError(_reason(error)) from error
        parts = [getattr(part, "text", None) or f"[{part.type}, which cannot be shown]" for part in result.content]
        text = "\n".join(parts)
        if result.is_error:
            raise ToolCallError(text)
        return text

    def _wait(self, work: Coroutine[Any, Any, Result], seconds: float) -> Result:
        """Run ``work`` in the thread of the connection; cancel it after ``seconds`` or an interrupt."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except BaseException:
            future.cancel()
            raise


def _reason(error: BaseException) -> str:
    """Return one line about an error; a group of errors is represented by its first one."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(str(error).split()) or type(error).__name__
