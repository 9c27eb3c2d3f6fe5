"""Texts in Hydra's grammar: quoted so that nothing in them has a meaning.

https://hydra.cc/docs/advanced/override_grammar/basic/#quoted-values, and OmegaConf's escapes of interpolations.
"""

import re

_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_QUOTED_LIST = re.compile(rf"\s*(?:{_QUOTED})(?:\s*,\s*(?:{_QUOTED}))+\s*", re.DOTALL)
_ELEMENT = re.compile(rf"\s*(?:(?P<quoted>{_QUOTED})|(?P<plain>[^,]*?))\s*(?P<more>,|\Z)", re.DOTALL)


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
        return _elements(inner)
    if inner.startswith("[") and inner.endswith("]"):
        found = _elements(inner[1:-1])
        if len(found) > 1:
            return found
    return [value]


def _elements(listed: str) -> list[str]:
    texts: list[str] = []
    start, more = 0, True
    while more:
        match = _ELEMENT.match(listed, start)
        assert match is not None
        quoted = match["quoted"]
        texts.append(match["plain"] if quoted is None else re.sub(r"\\(['\"\\])", r"\1", quoted[1:-1]))
        start, more = match.end(), match["more"] == ","
    return texts


def _quoted(text: str) -> str:
    escaped = re.sub(r"(\\*)('|$(?!\n))", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"
