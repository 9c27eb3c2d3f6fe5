"""Tools of a chat: functions of a Python file, tools of MCP servers, and built-in tools, each behind consent."""
