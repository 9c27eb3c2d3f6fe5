"""``python -m flashmoe_mlx``: hand the command line to Hydra, and every error to a person in a line or two."""

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 2 for a mistake in the request, 1 for a failure, 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Hydra writes to streams that are closed, too; and a file that is opened later must not get their numbers.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may say what a terminal's encoding cannot
    try:
        from flashmoe_mlx.cli.application import run

        return run(arguments)
    except KeyboardInterrupt:
        from flashmoe_mlx.console.streams import say

        say("flashmoe_mlx: interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
