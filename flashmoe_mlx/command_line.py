"""Tidy the command line before Hydra sees it.

Hydra has one spelling for each situation: ``+key=value`` only for keys that are not in the configuration yet,
``key=value`` only for those that are, options never between overrides, and a grammar in which a comma or an apostrophe
in a prompt means something else. People should not have to know any of that.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from flashmoe_mlx.config import TEXT_KEYS, known_keys
from flashmoe_mlx.errors import InputError

_OVERRIDE = re.compile(r"\+*(?P<key>[A-Za-z_][\w./@:-]*)=(?P<value>.*)", re.DOTALL)
_GROUPS = ("task", "model", "backend", "experiment")
_OPTIONS = frozenset(
    (
        *("-h", "--help", "--hydra-help", "--version", "-i", "--info", "-sc", "--shell-completion"),
        *("-c", "--cfg", "-p", "--package", "--resolve", "-r", "--run", "-m", "--multirun"),
        *("-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir", "--experimental-rerun"),
    )
)
"""What Hydra's own parser knows; it answers others with its usage."""


def tidy(arguments: Sequence[str]) -> list[str]:
    """Arguments that mean to Hydra what ``arguments`` mean to a person: overrides first, then options.

    Raises:
        InputError: a key does not exist.
    """
    overrides: list[str] = []
    others: list[str] = []
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument)
        if match is not None and _root(match["key"]) == "hydra":
            overrides.append(argument.replace("=~/", f"={Path.home()}/", 1))
        elif match is not None:
            overrides.append(_override(match["key"], match["value"]))
        elif argument.partition("=")[0] in _OPTIONS or (others and others[-1] in _OPTIONS):
            others.append(argument)
        elif argument.startswith("-"):
            raise InputError(f"{argument}: no such option; --help lists what there is")
        else:
            raise InputError(f"{argument}: expected key=value; --help lists the keys")
    return overrides + others


def _override(key: str, value: str) -> str:
    root = _root(key)
    known = sorted({*known_keys(), *_GROUPS})
    if root not in known:
        close = difflib.get_close_matches(root, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise InputError(f"{key}: no such key; {hint}")
    if key in _GROUPS and value in ("", "null"):
        raise InputError(f"{key}={value}: the name is missing; --help lists what there is")
    if key == "model" and ("/" in value or value.endswith(".json")):
        key = "model.path"  # of no configuration that could be named so
    if key in TEXT_KEYS:
        # A folder may be none at all; a prompt is a text, whatever it is.
        return f"++{key}={value if value == 'null' and key != 'prompt' else _verbatim(value)}"
    # "++" sets a key whether it is there or not, but Hydra has no such spelling for the choice of a group. What should
    # not be there is refused later, by those who know what should.
    return f"{key}={value}" if key in _GROUPS else f"++{key}={value}"


def _root(key: str) -> str:
    return re.split(r"[./@:]", key, maxsplit=1)[0]


def _verbatim(text: str) -> str:
    """``text`` as a quoted value of Hydra's grammar, in which nothing has a meaning any more.

    https://hydra.cc/docs/advanced/override_grammar/basic/#quoted-values, and OmegaConf's escapes of interpolations.
    """
    # A backslash is itself only where it stands before neither the quote nor an interpolation.
    escaped = re.sub(r"(\\*)(\$\{)", lambda m: m[1] * 2 + "\\" + m[2], text)
    escaped = re.sub(r"(\\*)('|$(?!\n))", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), escaped)
    return f"'{escaped}'"
