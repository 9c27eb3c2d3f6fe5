"""Check the web page of ``task=serve`` in a real browser, and take screenshots of it.

    npm pack axe-core && tar xf axe-core-*.tgz package/axe.min.js
    python tools/check_page.py --axe package/axe.min.js --screenshots /tmp/page

The page of the demo model, its observatory, the question for the key and a replay are shown in several states, three
widths, light and dark. axe-core reports faults of accessibility; the script fails if one is serious or critical, or if
the page is wider than its window. This needs the
extra ``browser``, and Chromium: Debian's if there is one, else the one that ``playwright install chromium`` installs.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Playwright, sync_playwright

from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.made_models.demo import demo_folder
from flashmoe_mlx.research.traces.random_traces import zipf_trace
from flashmoe_mlx.research.traces.replay_page import write_replay_page
from flashmoe_mlx.server.listen import HttpServer, listening_socket
from flashmoe_mlx.server.middleware import Policy
from flashmoe_mlx.server.service import Service, Settings
from flashmoe_mlx.stores.registry import backend_settings

SIZES = {"phone": (390, 844), "tablet": (820, 1100), "desktop": (1440, 900)}
KEY = "a key"
ASK = """async (tokens) => (await import("/web/api.js")).json("v1/chat/completions", {body: {
    model: "flashmoe-demo", messages: [{role: "user", content: "What is 17 plus 25?"}],
    max_tokens: tokens, min_tokens: tokens, temperature: 0}})"""
SERIOUS = ("serious", "critical")
MARKDOWN = """## Two ways

Read the experts **as they are needed**, or keep the *busiest* ones in `slots`:

| store | reads | GB/s |
| :-- | :-: | --: |
| `pread` | page cache | 6.1 |
| `io_uring` | direct | 7.4 |

1. choose the experts
2. read what is missing
   - one request a layer
   - no copy

```python
def fetch(layer: int, experts: list[int]) -> ExpertBatch:
    return store.fetch(layer, experts)  # a long line that is wider than a phone, so that its block scrolls sideways
```

> A speed without its bandwidth is not a result.

See [the notes](https://example.org/notes).
"""


def conversation() -> dict[str, Any]:
    """Return a stored conversation with each kind of message."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "How are experts served?\nPlease compare two ways."},
        {
            "role": "assistant",
            "content": MARKDOWN,
            "reasoning": "The user asks for a comparison.\n\nA table fits.",
            "calls": [],
            "state": "done",
            "finish": "stop",
            "usage": {"prompt": 41, "cached": 22, "completion": 187},
            "first": 0.4,
            "thought": 2.1,
            "seconds": 9.7,
        },
        {"role": "user", "content": "Please order cider, 6 pieces."},
        {
            "role": "assistant",
            "content": "",
            "reasoning": "",
            "calls": [{"id": "call_1", "name": "buy", "arguments": '{"product": "cider", "amount": 6}'}],
            "state": "done",
            "finish": "tool_calls",
            "usage": {"prompt": 301, "cached": 228, "completion": 24},
            "first": 0.2,
            "seconds": 0.9,
        },
    ]
    nodes = {}
    parent = None
    for number, message in enumerate(messages):
        name = f"node{number}"
        nodes[name] = {"id": name, "parent": parent, "created": number, **message}
        parent = name
    settings = {"system": "", "tools": "", "thinking": "", "sampling": {"temperature": 0}}
    shared = {"created": 1, "settings": settings, "draft": ""}
    first = {"id": "seeded", "title": "How are experts served?", "updated": 3, "revision": 1, "nodes": nodes}
    return {**first, "head": parent, **shared}


@contextmanager
def served(*keys: bytes) -> Iterator[str]:
    """Serve the demo model, for which ``keys`` are needed; yield the address of its page."""

    def reload(backend: str | None = None, experts_k: int | None = None) -> Engine:
        return load(demo_folder(), backend or {**backend_settings("ram_hybrid"), "budget_gib": 0.006}, experts_k)

    listener = listening_socket("127.0.0.1", 0)
    server = HttpServer(Service(reload, Settings("flashmoe-demo", reload=reload)), Policy(keys))
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(listener, ready.set), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.stop()
        thread.join()


def launch(playwright: Playwright) -> Browser:
    """Start Chromium."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    return playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])


def seed(page: Page) -> None:
    """Put a conversation into the browser's store, and open it."""
    script = """(conversation) => new Promise((resolve, reject) => {
        const request = indexedDB.open("flashmoe_mlx");
        request.onerror = reject;
        request.onsuccess = () => {
            const done = request.result.transaction("conversations", "readwrite");
            done.objectStore("conversations").put(conversation);
            done.oncomplete = resolve;
        };
    })"""
    page.evaluate(script, conversation())
    page.reload()
    page.get_by_text("flashmoe-demo").first.wait_for(state="attached")
    page.locator("article").first.wait_for()


def states(page: Page) -> Iterator[str]:
    """Bring the page into one state after the other; yield their names."""
    page.get_by_text("Ask the model something.").wait_for()
    yield "empty"
    seed(page)
    yield "results"
    page.locator("summary", has_text="Thought for").click()
    page.locator("#transcript").evaluate("(frame) => { frame.scrollTop = 0; }")
    page.wait_for_timeout(100)
    yield "chat"
    page.get_by_role("button", name="Edit").first.click()
    yield "edit"
    page.keyboard.press("Escape")
    toggle = page.locator("#toggle-conversations")
    if toggle.get_attribute("aria-expanded") == "false":
        toggle.click()
        yield "list"
        page.keyboard.press("Escape")
    page.locator("#open-settings").click()
    page.get_by_label("System message").wait_for()
    yield "settings"
    page.keyboard.press("Escape")


def observatory(page: Page) -> Iterator[str]:
    """Bring the observatory into one state after the other; yield their names."""
    page.get_by_text("Ask the model something.").wait_for()
    page.locator("#toggle-observatory").click()
    page.locator(".observatory .note", has_text="8 layers of 64 experts").wait_for()
    yield "observatory-idle"
    page.evaluate(ASK, 60)
    page.locator(".observatory .curve").wait_for()
    page.wait_for_timeout(600)
    yield "observatory"
    page.locator("canvas.grid").click(position={"x": 5, "y": 5})
    page.locator(".expert h3", has_text="Layer 0").wait_for()
    page.locator("#observatory-experts").fill("4")
    page.get_by_role("button", name="Switch").click()
    page.locator(".runs tbody tr").first.wait_for()
    page.evaluate(ASK, 20)
    page.locator("summary", has_text="The grid as a table").click()
    page.locator("canvas.grid").click(position={"x": 5, "y": 5})
    page.wait_for_timeout(600)
    page.locator(".expert").scroll_into_view_if_needed()
    yield "observatory-expert"
    page.locator(".runs").scroll_into_view_if_needed()
    yield "observatory-switched"
    page.locator("#toggle-observatory").click()


def key(page: Page) -> Iterator[str]:
    """Ask for the API key, refuse one, and yield the names of the states."""
    page.get_by_role("textbox", name="Key").wait_for()
    yield "key"
    page.get_by_role("textbox", name="Key").fill("wrong")
    page.get_by_role("button", name="Use this key").click()
    page.get_by_text("The server refused this key.").wait_for()
    yield "key-refused"
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("The server refuses this page").wait_for()
    yield "refused"


def replay(page: Page) -> Iterator[str]:
    """Play a trace, and yield the names of the states."""
    page.locator(".observatory .curve").wait_for()
    page.wait_for_timeout(1500)
    yield "replay"


def findings(page: Page, axe: str) -> list[str]:
    """Return the serious faults that axe-core reports, a line each, and whether the page is too wide."""
    page.evaluate(axe)
    results = page.evaluate("() => axe.run({ resultTypes: ['violations'] })")
    found = [
        f"{each['impact']} {each['id']}: {each['help']}: {json.dumps([node['target'] for node in each['nodes']])[:300]}"
        for each in results["violations"]
    ]
    if page.evaluate("() => document.scrollingElement.scrollWidth > innerWidth"):
        found.append("serious: the page is wider than its window")
    return found


def main() -> int:
    """Run the checks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js of the npm package axe-core")
    parser.add_argument("--screenshots", type=Path, help="folder for screenshots")
    options = parser.parse_args()
    folder = options.screenshots or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    axe = options.axe.read_text()
    serious = checked = 0
    zipf_trace(400, 12, 64, 8, 1.0, seed=1).save(folder / "made.moetrace")
    write_replay_page(folder / "made.moetrace", folder / "replay.html")
    with served() as url, served(KEY.encode()) as guarded, sync_playwright() as playwright:
        browser = launch(playwright)
        pages = {url: (states, observatory), guarded: (key,), f"file://{folder.resolve()}/replay.html": (replay,)}
        for (size, (width, height)), colors in itertools.product(SIZES.items(), ("light", "dark")):
            for address, shows in ((address, shows) for address, all_shows in pages.items() for shows in all_shows):
                viewport = {"width": width, "height": height}
                context = browser.new_context(viewport=viewport, color_scheme=colors, has_touch=size == "phone")
                page = context.new_page()
                page.goto(address)
                for state in shows(page):
                    page.screenshot(path=folder / f"{size}-{colors}-{state}.png")
                    checked += 1
                    for finding in findings(page, axe):
                        serious += finding.startswith(SERIOUS)
                        print(f"{size} {colors} {state}: {finding}")
                context.close()
        browser.close()
    print(f"{checked} views, {serious} serious findings; screenshots in {folder}")
    return 1 if serious else 0


if __name__ == "__main__":
    sys.exit(main())
