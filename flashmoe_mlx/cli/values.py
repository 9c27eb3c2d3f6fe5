"""Values of overrides, rewritten so that Hydra's grammar reads them as people mean them."""

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from flashmoe_mlx.cli.quoting import elements, quoted_reference, separate_texts, verbatim
from flashmoe_mlx.paths import expand_path

MISSING_VALUE = "???"
"""OmegaConf's mark of a missing value."""


def text_value(value: str, sweeps: bool, nullable: bool) -> str:
    """Return text whose characters have no meaning to Hydra.

    Args:
        value: the text as typed.
        sweeps: whether ``value`` may hold several texts, one for each run of a sweep.
        nullable: whether ``null`` means no value rather than the text "null".
    """
    texts = separate_texts(value) if sweeps else [value]
    return ",".join(text if text == "null" and nullable else verbatim(text) for text in texts)


def text_list_value(key: str, value: str, sweeps: bool) -> str:
    """Return a list of texts whose characters have no meaning to Hydra; leave other values unchanged."""
    inner = value.strip()
    listed = inner.startswith("[") and inner.endswith("]") and bool(inner[1:-1].strip())
    written = elements(inner[1:-1]) if listed else []
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}").value()
    except HydraException:
        if not listed or sweeps:
            return value
        parsed = written
    if not isinstance(parsed, list) or any(isinstance(element, list | dict) for element in parsed):
        return value  # a sweep over lists, or a mistake that the check of types explains
    if len(written) == len(parsed):  # null, 007 and similar elements are texts, too
        parsed = [element if isinstance(element, str) else text for element, text in zip(parsed, written, strict=True)]
    return f"[{','.join(verbatim(str(text)) for text in parsed)}]"


def backend_value(value: str, sweeps: bool) -> str:
    """Return the value of a backend's option: a path becomes text, Hydra interprets anything else that it can read."""
    if value.strip().startswith("["):
        return text_list_value("backend", value, sweeps)
    if "/" in value or value.startswith("~"):
        return text_value(value, sweeps, nullable=False)
    return value if is_readable(value) else verbatim(value)


def folder_value(value: str, expand: bool) -> str:
    """Return a folder of a run, in which only interpolations such as ``${now:%Y}`` have a meaning.

    Args:
        value: the folder as typed, perhaps in quotes, as Hydra's documentation recommends.
        expand: whether a leading ``~`` stands for the home folder.
    """
    quoted = re.fullmatch(r"(['\"])(.*)\1", value, re.DOTALL)
    folder = re.sub(r"\\(['\"])", r"\1", quoted[2]) if quoted else value
    if expand:
        folder = str(expand_path(folder))
    return quoted_reference(f"./{folder}" if folder == MISSING_VALUE else folder)


def is_readable(value: str) -> bool:
    """Return whether Hydra's grammar can read ``value``."""
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return False
    return True
