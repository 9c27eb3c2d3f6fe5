"""Filesystems in memory that fill up, for tests by users who may mount them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_filesystem(folder: Path, size: str) -> Iterator[Path]:
    """Mount a filesystem of ``size``, such as "40k", as the new ``folder``; skip the test if this user cannot."""
    folder.mkdir()
    mounted = shutil.which("mount") and sys.platform == "linux" and os.geteuid() == 0
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
    if not mounted or subprocess.run(command, check=False).returncode:
        pytest.skip("this user cannot mount a filesystem")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
