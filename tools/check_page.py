"""Check the web page of ``task=serve`` in a real browser, and take screenshots of it.

    npm pack axe-core && tar xf axe-core-*.tgz package/axe.min.js
    python tools/check_page.py --axe package/axe.min.js --screenshots /tmp/page

The page of the demo model is shown in several states, three widths, light and dark. axe-core reports faults of
accessibility; the script fails if one is serious or critical, or if the page is wider than its window. This needs the
extra ``browser``, and Chromium: Debian's if there is one, else the one that ``playwright install chromium`` installs.
"""

import argparse
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

from flashmoe_mlx.engine import load
from flashmoe_mlx.made_models.demo import demo_folder
from flashmoe_mlx.server.listen import HttpServer, listening_socket
from flashmoe_mlx.server.middleware import Policy
from flashmoe_mlx.server.service import Service, Settings

SIZES = {"phone": (390, 844), "tablet": (820, 1100), "desktop": (1440, 900)}
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
def served() -> Iterator[str]:
    """Serve the demo model; yield the address of its page."""
    listener = listening_socket("127.0.0.1", 0)
    server = HttpServer(Service(lambda: load(demo_folder()), Settings("flashmoe-demo")), Policy())
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
    with served() as url, sync_playwright() as playwright:
        browser = launch(playwright)
        for size, (width, height) in SIZES.items():
            for colors in ("light", "dark"):
                viewport = {"width": width, "height": height}
                context = browser.new_context(viewport=viewport, color_scheme=colors, has_touch=size == "phone")
                page = context.new_page()
                page.goto(url)
                for state in states(page):
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
