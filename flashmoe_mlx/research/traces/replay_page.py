"""A web page in one file that replays a routing trace: scripts, styles and data are inside, and nothing is fetched.

The scripts are those of the observatory of ``task=serve``. Modules cannot be imported from a file, so they are joined
into one. The trace is the bytes of its file, compressed.
"""

import base64
import re
import zlib
from importlib.resources import files
from pathlib import Path

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.files import write_atomically

MOST_BYTES = 32 * 2**20
"""The largest page, which browsers open without trouble and people can send."""
_MODULES = ("dom", "history", "frames", "trace", "charts", "expert", "grid", "view", "player", "switch")
"""Modules of the observatory, in the order of their dependences; the main module follows."""
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./[a-z_]+\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?function|class|const)", re.MULTILINE)
_COLORS = re.compile(r":root \{.*?\n\}", re.DOTALL)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>A mixture of experts at work</title>
<style>
{style}
</style>
</head>
<body>
<main id="observatory"></main>
<noscript>This page needs JavaScript.</noscript>
<script type="text/plain" id="trace">{data}</script>
<script type="module">
{script}
const text = atob(document.getElementById("trace").textContent);
const packed = Uint8Array.from(text, (character) => character.charCodeAt(0));
const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
mountReplay(document.getElementById("observatory"), await new Response(unpacked).arrayBuffer());
</script>
</body>
</html>
"""
_STYLE = """
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
main { max-width: 72rem; margin: 0 auto; }
button, input, select { font: inherit; color: inherit; }
select { padding: 0.3rem 0.5rem; border: 1px solid var(--soft); border-radius: 0.6rem; background: var(--paper); }
button { padding: 0.3rem 0.9rem; border: 1px solid transparent; border-radius: 0.6rem; cursor: pointer; }
button.primary { background: var(--accent); color: var(--on-accent); font-weight: 600; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.for-screen-readers { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
"""


def write_replay_page(trace: Path, path: Path) -> None:
    """Write a page that replays the trace in the file ``trace``, which was loaded without an error, to ``path``.

    Raises:
        InputError: the page would be larger than 32 MiB (code "page_too_large"), or cannot be written
            ("cannot_write_page").
    """
    packed = zlib.compress(trace.read_bytes(), 9)
    page = _PAGE.format(style=_style(), script=_script(), data=base64.b64encode(packed).decode()).encode()
    if len(page) > MOST_BYTES:
        raise InputError(
            f"{path}: a page of {len(page) / 2**20:.0f} MiB is too large for browsers; the limit is "
            f"{MOST_BYTES // 2**20} MiB. Record fewer tokens",
            code="page_too_large",
        )
    try:
        write_atomically(path, page)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the page cannot be written there ({error})", code="cannot_write_page") from error


def _web(name: str) -> str:
    return files("flashmoe_mlx.server").joinpath("web", name).read_text()


def _script() -> str:
    """Return all modules of the observatory as one."""
    modules = [*(f"observatory_{name}.js" for name in _MODULES), "observatory.js"]
    return "\n".join(_scoped(_IMPORT.sub("", _web(name))) for name in modules)


def _scoped(module: str) -> str:
    """Return a module without exports, in a block that keeps its private constants apart."""
    names = re.findall(r"^export (?:async )?(?:function|class|const) (\w+)", module, re.MULTILINE)
    body = _EXPORT.sub("", module)
    return f"const {{ {', '.join(names)} }} = (() => {{\n{body}\nreturn {{ {', '.join(names)} }};\n}})();"


def _style() -> str:
    colors = _COLORS.search(_web("style.css"))
    assert colors is not None
    return colors[0] + _STYLE + _web("observatory.css")
