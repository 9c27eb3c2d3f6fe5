"""Take the pictures of README: the chat in a terminal, and the page with the observatory.

    python tools/take_pictures.py                # writes docs/images/
    python tools/take_pictures.py --out /tmp/pictures

Both show the demo model. The chat runs in a pseudo-terminal, whose screen Chromium draws. This needs the extras
``browser``, ``chat``, ``server`` and ``test``.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent / "tests")]
from check_page import launch, served  # noqa: E402  # beside this file
from terminal import Terminal  # noqa: E402  # in tests/

COLUMNS, LINES = 108, 24
DARK = "3c424e ff7b72 7ec98c e2b460 7aa2f7 c896fa 6ec8dc e6e8ec"
BRIGHT = "7d8596 ff968c 96dca0 f0c878 96b9ff d7afff 8cdceb ffffff"
PAPER, INK = (21, 23, 28), (230, 232, 236)
NAMES = {"brown": "yellow", "brightbrown": "bright_yellow", "default": "default"}


def theme() -> TerminalTheme:
    """Return the colors of the terminal."""
    dark, bright = ([tuple(bytes.fromhex(color)) for color in colors.split()] for colors in (DARK, BRIGHT))
    return TerminalTheme(PAPER, INK, dark, bright)


def chat_lines(folder: Path) -> list[Text]:
    """Chat with the demo model in ``folder``; return the lines of the screen."""
    command = [sys.executable, "-m", "flashmoe_mlx", "task=chat", "temperature=0"]
    terminal = Terminal([*command, "history=history.txt", "hydra.run.dir=run"], folder, COLUMNS, LINES)
    try:
        terminal.wait("Ctrl-D ends the chat")
        terminal.type("Tell me something about yourself.", "call tools.")
        terminal.type("What is 17 plus 25?", "42.")
        terminal.type("/backend ram_hybrid budget_gib=0.006", "backend: ")
        terminal.type("What is 8 plus 9?", "17.")
        terminal.type("/stats", "decode")
        terminal.wait_for_input()
        screen = terminal.screen
        return [_line(screen.buffer[number], COLUMNS) for number in range(LINES)]
    finally:
        terminal.close()


def _line(characters: Any, columns: int) -> Text:
    line = Text()
    for column in range(columns):
        character = characters[column]
        styles = {name: getattr(character, name) for name in ("bold", "underscore", "italics", "reverse")}
        line.append(
            character.data,
            Style(
                color=_color(character.fg),
                bgcolor=_color(character.bg),
                bold=styles["bold"],
                underline=styles["underscore"],
                italic=styles["italics"],
                reverse=styles["reverse"],
            ),
        )
    return line


def _color(name: str) -> str:
    if len(name) == 6 and name not in NAMES and all(digit in "0123456789abcdef" for digit in name):
        return f"#{name}"
    return NAMES.get(name, name.replace("bright", "bright_"))


def take_chat(browser: Browser, lines: list[Text], path: Path) -> None:
    """Draw ``lines`` as a picture in ``path``."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in lines:
        console.print(line, soft_wrap=True)
    content = console.export_html(theme=theme(), inline_styles=True, code_format="{code}")
    style = (
        "body { margin: 0; background: #15171c } pre { margin: 0; padding: 14px 18px; display: inline-block; "
        "color: #e6e8ec; background: #15171c; font: 14px/19px 'DejaVu Sans Mono', monospace }"
    )
    page = browser.new_page(viewport={"width": 1200, "height": 700})
    page.set_content(f"<style>{style}</style><pre>{content}</pre>")
    page.locator("body > pre").screenshot(path=path)
    page.close()


def take_page(browser: Browser, path: Path) -> None:
    """Chat on the page with the observatory open; write a picture to ``path``."""
    with served() as url:
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        page.goto(url)
        page.locator("#toggle-observatory").click()
        page.locator(".observatory .note", has_text="8 layers of 64 experts").wait_for()
        page.locator("#toggle-conversations").click()
        for number, question in enumerate(("What is 17 plus 25?", "Tell me something about yourself.")):
            page.get_by_role("textbox", name="Question").fill(question)
            page.keyboard.press("Enter")
            page.locator("article.assistant[aria-busy=false]").nth(number).wait_for()
        page.locator(".observatory .curve").wait_for()
        page.wait_for_timeout(300)
        page.screenshot(path=path)
        page.close()


def main(arguments: list[str] | None = None) -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TOOLS.parent / "docs" / "images")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = launch(playwright)
        take_chat(browser, chat_lines(Path(folder)), out / "chat.png")
        take_page(browser, out / "page.png")
        browser.close()


if __name__ == "__main__":
    main()
