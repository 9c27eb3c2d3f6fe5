"""Quoting of texts in Hydra's grammar, so that none of their characters has a special meaning.

Sources: https://hydra.cc/docs/advanced/override_grammar/basic/#quoted-values, and OmegaConf's escapes of
interpolations.
"""

import re
from collections.abc import Callable

_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_QUOTED_LIST = re.compile(rf"\s*(?:{_QUOTED})(?:\s*,\s*(?:{_QUOTED}))+\s*", re.DOTALL)
_ELEMENT = re.compile(rf"\s*(?:(?P<quoted>{_QUOTED})|(?P<plain>[^,]*?))\s*(?P<more>,|\Z)", re.DOTALL)
_PLAIN = r"[^\[\]{},'\"\s](?:[^\[\]{},'\"]*[^\[\]{},'\"\s])?"
_SCALAR = re.compile(rf"{_QUOTED}|(?P<key>\w+\s*:\s*)?(?P<scalar>{_PLAIN})", re.DOTALL)
"""A quoted text, a key of a mapping with its value, or an element of a list."""


def verbatim(text: str) -> str:
    """Return ``text`` as a quoted value in which no character has a special meaning."""
    # Backslashes need escapes only before a quote or an interpolation.
    return _quote(re.sub(r"(\\*)(\$\{)", lambda match: match[1] * 2 + "\\" + match[2], text))


def quoted_reference(text: str) -> str:
    """Return ``text`` as a quoted value in which only ``${...}`` has a special meaning."""
    return _quote(text)


def separate_texts(value: str) -> list[str]:
    """Split the texts of a sweep, ``'a','b'`` or ``[a,b]``; return any other value as a single text."""
    inner = value.strip()
    if _QUOTED_LIST.fullmatch(inner):
        return elements(inner)
    if inner.startswith("[") and inner.endswith("]"):
        found = elements(inner[1:-1])
        if len(found) > 1:
            return found
    return [value]


def elements(text: str) -> list[str]:
    """Split a list at its commas, except commas within quotes, and remove the quotes."""
    texts: list[str] = []
    start, more = 0, True
    while more:
        match = _ELEMENT.match(text, start)
        assert match is not None
        texts.append(match["plain"] if match["quoted"] is None else _unquote(match["quoted"]))
        start, more = match.end(), match["more"] == ","
    return texts


def quote_scalars(value: str, is_readable: Callable[[str], bool]) -> str:
    """Quote the scalars in a list or mapping that are not readable.

    An example is the path in ``[{name:ram_hybrid,trace:~/x}]``.
    """

    def quote(match: re.Match[str]) -> str:
        scalar = match["scalar"]
        return match[0] if scalar is None or is_readable(scalar) else (match["key"] or "") + verbatim(scalar)

    return _SCALAR.sub(quote, value)


def _unquote(text: str) -> str:
    """Return the text between quotes. As in Hydra, only backslashes before a quote are doubled."""
    return re.sub(rf"(\\+)({text[0]}|\Z)", lambda match: match[1][: len(match[1]) // 2] + match[2], text[1:-1])


def _quote(text: str) -> str:
    escaped = re.sub(r"(\\*)('|$(?!\n))", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"
