"""The format of tool calls that a chat template asks its model for."""

import re

_FORMATS = (
    ("qwen_xml", (r"<function=", r"<parameter=")),
    ("hermes", (r"<tool_call>", r'\\?"name\\?": ', r'\\?"arguments\\?": ')),
)
"""Names of modules in this package, and patterns that all occur in the templates of each format."""


def format_of_template(source: str) -> str | None:
    """Return the format in which a template writes past calls, or None if the format is not known."""
    for name, patterns in _FORMATS:
        if all(re.search(pattern, source) for pattern in patterns):
            return name
    return None
