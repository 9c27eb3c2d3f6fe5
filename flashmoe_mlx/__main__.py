"""Entry point of ``python -m flashmoe_mlx`` and of the command ``flashmoe_mlx``."""

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    The code is 0 for success, 1 for a failure, 2 for a mistake in the request, and 130 for an interrupt.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # Hydra writes even to closed streams, and a file opened later must not get the descriptor of a closed stream.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # the terminal's encoding may lack characters of the answer
    try:
        from flashmoe_mlx.cli.application import run

        return run(arguments)
    except KeyboardInterrupt:
        from flashmoe_mlx.console.streams import say

        say("flashmoe_mlx: interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
