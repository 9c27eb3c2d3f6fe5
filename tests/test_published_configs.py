"""Every published config runs natively, runs through mlx-lm, or is refused by one line; docs/models.md has the table.

``python tests/test_published_configs.py`` writes the table again, with mlx-lm installed.
"""

import json
import math
import sys
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from published import ARCHIVE

from flashmoe_mlx.adapters.library import MODEL_TYPES, is_installed
from flashmoe_mlx.checkpoint.formats import coded_weights
from flashmoe_mlx.checkpoint.published import known_config
from flashmoe_mlx.checkpoint.support import why_not
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.models.registry import families, parse_config
from flashmoe_mlx.research.estimate.sizes import expert_weights

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table of published configs -->\n", "<!-- end of the table -->\n"
NATIVE = {kind for family in families() for kind in family.model_types}
BILLIONS = {
    "Qwen3-235B-A22B": (235, 22),
    "Qwen3-30B-A3B": (30.5, 3.3),
    "Qwen3-30B-A3B-Thinking-2507": (30.5, 3.3),
    "Qwen3-Coder-480B-A35B-Instruct": (480, 35),
    "Qwen3-Coder-30B-A3B-Instruct": (30.5, 3.3),
    "Qwen3-Next-80B-A3B-Instruct": (80, 3.5),
    "Qwen3-Coder-Next": (80, 3.5),
}
"""Weights, and weights that a token uses, by the model cards; an embedding counts once in the latter."""


@cache
def configs() -> dict[str, dict[str, Any]]:
    """Return the published configs by the name of their model; empty without the archive."""
    if not ARCHIVE.exists():
        return {}
    found = {}
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            path = Path(member.name)
            if path.name == "config.json" and (file := archive.extractfile(member)) is not None:
                found[path.parent.name] = json.loads(file.read())
    return dict(sorted(found.items()))


def row(name: str) -> str:
    """Return the row of a model: how it runs, and the reason if it does not."""
    kind, reason = configs()[name]["model_type"], why_not(configs()[name])
    how = "natively" if kind in NATIVE else "through mlx-lm"
    if reason is not None:
        how = "no"
        reason = f"{kind} is not supported" if kind not in (*NATIVE, *MODEL_TYPES) else first_clause(reason)
    elif how == "natively" and (codes := coded_weights(configs()[name])) is not None:
        how, reason = "natively, from a pack", f"{codes.name}, read and requantized by `task=pack`"
    return f"| {name} | `{kind}` | {how} | {reason or ''} |"


def first_clause(reason: str) -> str:
    return reason.removeprefix("config.json: ").partition(";")[0]


def rows_of_document() -> dict[str, str]:
    """Return the rows of the document by the name of their model."""
    lines = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    return {line.split("|")[1].strip(): line for line in lines}


def document() -> str:
    """Return the document with the present table; MLX-LM must be installed."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    rows = ["| model | `model_type` | runs | reason |", "| --- | --- | --- | --- |", *map(row, configs())]
    return before + BEGIN + "\n" + "\n".join(rows) + "\n\n" + END + rest.partition(END)[2]


@pytest.mark.parametrize("name", configs())
def test_the_table_of_the_document_is_the_present_one(name: str) -> None:
    if configs()[name]["model_type"] in set(MODEL_TYPES) - NATIVE and not is_installed():
        assert name in rows_of_document()
    else:
        assert rows_of_document()[name] == row(name), "run: python tests/test_published_configs.py"


@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE} does not exist")
def test_the_table_has_no_other_models() -> None:
    assert rows_of_document().keys() == configs().keys()


@pytest.mark.parametrize("name", configs())
def test_each_refusal_is_one_line(name: str) -> None:
    reason = why_not(configs()[name])
    assert (reason is None) or ("\n" not in reason and len(reason) < 400)
    if configs()[name]["model_type"] in NATIVE and "quantization_config" not in configs()[name]:
        assert reason is None


@pytest.mark.parametrize("name", [name for name, found in configs().items() if found["model_type"] == "qwen3_moe"])
def test_configs_that_are_known_without_a_network(name: str) -> None:
    known = known_config(f"{name}-Instruct" if "Coder" in name else name)
    assert known is not None
    assert parse_config(known) == parse_config(configs()[name])


@pytest.mark.parametrize("name", BILLIONS)
def test_weights_match_the_names_of_models(name: str) -> None:
    known = known_config(name)
    assert known is not None
    config = parse_config(known)
    assert isinstance(config, ModelConfig)
    resident = sum(math.prod(parameter.shape) for parameter in config.resident_parameters())
    of_a_layer = expert_weights(config) * len(config.moe_layers)
    every, used = BILLIONS[name]
    assert (resident + of_a_layer * config.num_experts) / 1e9 == pytest.approx(every, rel=0.01)
    touched = resident - config.vocab_size * config.hidden_size + of_a_layer * config.experts_per_token
    assert touched / 1e9 == pytest.approx(used, rel=0.12)


if __name__ == "__main__":
    if not configs() or not is_installed():
        sys.exit(f"this needs {ARCHIVE} and mlx-lm")
    DOCUMENT.write_text(document())
