"""The pictures of README, taken again."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parent.parent


def test_the_pictures_of_readme_can_be_taken(tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api")
    command = [sys.executable, str(ROOT / "tools" / "take_pictures.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("chat.png", "page.png"):
        assert f"docs/images/{name}" in (ROOT / "README.md").read_text()
        taken, shown = ((folder / name).read_bytes()[16:24] for folder in (tmp_path, ROOT / "docs" / "images"))
        assert taken == shown  # width and height, in the header of a PNG
