"""The lines of docs/serve.md for a client."""

import re
from pathlib import Path

_PAGE = Path(__file__).parents[2] / "docs" / "serve.md"


def documented(section: str, kind: str, url: str, name: str) -> str:
    """Return the block of ``kind`` in a section, for a server at ``url`` that serves the model ``name``."""
    text = _PAGE.read_text().partition(f"### {section}\n")[2].partition("\n### ")[0]
    (code,) = re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return str(code).replace("http://127.0.0.1:8080", url).replace("NAME", name)
