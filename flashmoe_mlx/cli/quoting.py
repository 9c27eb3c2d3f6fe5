"""Texts in Hydra's grammar: quoted so that nothing in them has a meaning.

https://hydra.cc/docs/advanced/override_grammar/basic/#quoted-values, and OmegaConf's escapes of interpolations.
"""

import re
from collections.abc import Callable

_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_QUOTED_LIST = re.compile(rf"\s*(?:{_QUOTED})(?:\s*,\s*(?:{_QUOTED}))+\s*", re.DOTALL)
_ELEMENT = re.compile(rf"\s*(?:(?P<quoted>{_QUOTED})|(?P<plain>[^,]*?))\s*(?P<more>,|\Z)", re.DOTALL)
_PLAIN = r"[^\[\]{},'\"\s](?:[^\[\]{},'\"]*[^\[\]{},'\"\s])?"
_SCALAR = re.compile(rf"{_QUOTED}|(?P<key>\w+\s*:\s*)?(?P<scalar>{_PLAIN})", re.DOTALL)
"""A quoted text, or else a key of a mapping with the value after it, or an element of a list."""


def verbatim(text: str) -> str:
    """Return ``text`` as a quoted value in which nothing has a meaning."""
    # A backslash is itself only where it stands before neither the quote nor an interpolation.
    return _quoted(re.sub(r"(\\*)(\$\{)", lambda m: m[1] * 2 + "\\" + m[2], text))


def quoted_reference(text: str) -> str:
    """Return ``text`` as a quoted value in which only ``${...}`` has a meaning."""
    return _quoted(text)


def separate_texts(value: str) -> list[str]:
    """Split the texts of a sweep: ``'a','b'`` or ``[a,b]``; anything else is one text as it stands."""
    inner = value.strip()
    if _QUOTED_LIST.fullmatch(inner):
        return elements(inner)
    if inner.startswith("[") and inner.endswith("]"):
        found = elements(inner[1:-1])
        if len(found) > 1:
            return found
    return [value]


def elements(listed: str) -> list[str]:
    """Split texts at the commas between them; quotes around a text keep its own commas."""
    texts: list[str] = []
    start, more = 0, True
    while more:
        match = _ELEMENT.match(listed, start)
        assert match is not None
        texts.append(match["plain"] if match["quoted"] is None else _unquoted(match["quoted"]))
        start, more = match.end(), match["more"] == ","
    return texts


def quote_scalars(value: str, readable: Callable[[str], bool]) -> str:
    """Quote what is not ``readable`` in a list or mapping, such as the path in ``[{name:ram_hybrid,trace:~/x}]``."""

    def quoted(match: re.Match[str]) -> str:
        scalar = match["scalar"]
        return match[0] if scalar is None or readable(scalar) else (match["key"] or "") + verbatim(scalar)

    return _SCALAR.sub(quoted, value)


def _unquoted(text: str) -> str:
    """Return what is between quotes; as in Hydra, backslashes are doubled only where they stand before a quote."""
    return re.sub(rf"(\\+)({text[0]}|\Z)", lambda m: m[1][: len(m[1]) // 2] + m[2], text[1:-1])


def _quoted(text: str) -> str:
    escaped = re.sub(r"(\\*)('|$(?!\n))", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"
