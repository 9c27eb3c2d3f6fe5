"""Record transformers' logits into ``fixtures/``: ``python tests/oracle/record.py [part of a case's name ...]``.

This needs the ``oracle`` extra and takes one or two minutes.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_checkpoints import weights_hash

from oracle.recorded import CASES, FIXTURES, LONG_CASES, LONG_PROMPT_LENGTH, LONG_ROWS, PROMPT_LENGTH, Case, LongCase
from oracle.reference import Reference, argmax_margin

LONG_ROUTING_MARGIN = 4e-6
"""Smallest margin of a chosen expert in a long run: several times the rounding error of router logits in float32."""


def main() -> None:
    FIXTURES.mkdir(exist_ok=True)
    wanted = sys.argv[1:] or [""]
    for case in (*CASES, *LONG_CASES):
        if any(part in case.name for part in wanted):
            record(case)
    recorded = [path.stat().st_size for path in FIXTURES.iterdir()]
    print(f"{len(recorded)} recordings, {sum(recorded) / 1e6:.2f} MB")


def record(case: Case) -> None:
    weights = case.weights()
    reference = Reference(case.geometry, weights, case.experts_k)
    if isinstance(case, LongCase):
        tokens, logits = reference.long_run(case.name, LONG_PROMPT_LENGTH, LONG_ROUTING_MARGIN)
        logits = logits[LONG_ROWS]
    else:
        tokens, logits = reference.unambiguous_run(case.name)
    np.savez_compressed(
        case.path,
        tokens=tokens.astype(np.int16),
        logits=logits,
        weights_sha256=weights_hash(weights),
        made_by=f"transformers {transformers.__version__}, torch {torch.__version__}",
    )
    print(
        f"{case.name}: logits of rms {np.sqrt(np.mean(logits**2)):.2f}, {len(set(tokens[PROMPT_LENGTH:].tolist()))}"
        f" different tokens, margins: argmax {argmax_margin(logits):.1e}, routing {reference.routing_margin:.1e}, "
        f"index {reference.index_margin:.1e}"
    )


if __name__ == "__main__":
    main()
