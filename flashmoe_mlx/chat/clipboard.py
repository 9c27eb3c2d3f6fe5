"""The clipboard of the user, by the system's program or by the terminal."""

import base64
import os
import shutil
import subprocess
import sys

from flashmoe_mlx.console.streams import print_answer
from flashmoe_mlx.errors import InputError

_PROGRAMS = (
    (("pbcopy",), None),
    (("wl-copy",), "WAYLAND_DISPLAY"),
    (("xclip", "-selection", "clipboard"), "DISPLAY"),
)
"""Programs with the environment variable that they need."""
_LARGEST_SEQUENCE = 74994
"""Number of characters of an OSC 52 sequence that common terminals accept."""
_SECONDS = 5.0


def copy(text: str) -> str:
    """Copy ``text`` to the clipboard; return a note about the way.

    Raises:
        InputError: there is no clipboard; code "no_clipboard".
    """
    for command, variable in _PROGRAMS:
        if shutil.which(command[0]) and (variable is None or os.environ.get(variable)):
            try:
                subprocess.run(command, input=text.encode(errors="replace"), timeout=_SECONDS, check=True)  # noqa: S603
            except (OSError, subprocess.SubprocessError):
                continue
            return f"copied {len(text):,} characters"
    if sys.stdout is None or not sys.stdout.isatty():
        raise InputError("/copy: there is no clipboard without a terminal; use /save", code="no_clipboard")
    encoded = base64.b64encode(text.encode(errors="replace")).decode()
    if len(encoded) > _LARGEST_SEQUENCE:
        raise InputError("/copy: the answer is too long for the terminal's clipboard; use /save", code="no_clipboard")
    print_answer(f"\x1b]52;c;{encoded}\x07", end="")
    return f"sent {len(text):,} characters to the terminal's clipboard (OSC 52)"
