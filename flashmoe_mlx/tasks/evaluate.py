"""``task=evaluate``: quality of a model's answers for each combination of variants and K."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from flashmoe_mlx.console.output import activity, print_notes, print_table, show
from flashmoe_mlx.engine import load
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.formats.manifest import MANIFEST
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.research.figures import quality_figure, save
from flashmoe_mlx.research.quality.answering import check_constraints
from flashmoe_mlx.research.quality.evaluation import Quality, evaluate
from flashmoe_mlx.research.quality.items import Item, load_items, shipped_items
from flashmoe_mlx.research.quality.reference import Progress, Reference
from flashmoe_mlx.tasks.shared.automatic import chosen_backend
from flashmoe_mlx.tasks.shared.choices import check_choices
from flashmoe_mlx.tasks.shared.keys import TEXT, EngineConfig, engine_options
from flashmoe_mlx.tasks.shared.model import model_folder, model_identity

_log = logging.getLogger(__name__)
EVALUATE_VERSION = 1
RECORD = "evaluate.json"
_MARK = "*"
"""Mark of a row to which a note below the table refers."""
FIGURES = ("questions", "json_valid", "json_exact", "tool_calls")
_HEADINGS = (
    "experts", "K", "text ppl", "answer ppl", "KL nats", "top-1", "questions", "JSON valid", "JSON exact", "tool calls",
)  # fmt: skip
_CONSTRAINTS_HEADINGS = (
    "experts", "K", "constraints", "JSON valid", "JSON exact", "tool calls", "tokens", "forwards", "s",
)  # fmt: skip


@dataclass
class Config(EngineConfig):
    """Keys of ``task=evaluate``."""

    variants: list[str] | None = None
    experts_ks: list[int] | None = None
    items: str | None = field(default=None, metadata=TEXT)
    kinds: list[str] | None = None
    limit: int | None = None
    answers: bool = True
    constraints: bool = True
    reference: str | None = field(default=None, metadata=TEXT)
    reference_kernels: str = "auto"


def run(config: Config, run_dir: Path) -> None:
    """Evaluate each combination, show a table, and write ``evaluate.json`` and, for several K, ``evaluate.png``."""
    if config.limit is not None and config.limit < 1:
        raise InputError(f"limit={config.limit}: must be at least 1", code="out_of_range")
    check_choices("kinds", config.kinds)
    items = load_items(
        shipped_items() if config.items is None else expand_path(config.items), config.kinds, config.limit
    )
    settings = _settings(config)
    folder = model_folder(config.model, *(backend for backend, _ in settings))
    settings = [(chosen_backend(backend, folder, config.model, k), k) for backend, k in settings]
    record: dict[str, Any] = {
        "evaluate_version": EVALUATE_VERSION,
        "model": model_identity(folder),
        "items": {"file": config.items or "the demo model's held-out set", "count": len(items)},
        "environment": environment(),
        "cells": [],
    }
    with activity() as announce, _reference(config, folder, items, announce) as reference:
        record["reference"] = reference.setup
        for backend, k in settings:
            with load(
                folder,
                backend,
                k,
                prompt_cache_gib=0,
                on_load=announce,
                **engine_options(config),
            ) as engine:
                name = f"{backend.get('variant') or 'widest'} K={engine.setup['experts_k']}"
                report = _reporter(announce, f"{name}: ")
                quality = evaluate(
                    engine,
                    items,
                    reference,
                    generate=config.answers,
                    constraints=config.constraints,
                    progress=report,
                )
                record["cells"].append(_cell(engine.setup, quality))
            _log.info("%s: %s", name, quality.summary)
            write_json(run_dir / RECORD, record)  # keeps finished combinations if a later one fails
    show()
    print_table(_table(record["cells"]))
    constrained = [cell for cell in record["cells"] if "constraints" in cell]
    if constrained:
        show("\nJSON and tool calls without and with constraints:")
        print_table(_constraints_table(constrained))
    print_notes([reference.setup["note"]], prefix="reference: ")
    print_notes((cell["setup"]["note"] for cell in record["cells"]), prefix=f"{_MARK} ")
    if len({cell["setup"]["experts_k"] for cell in record["cells"]}) > 1:
        try:
            save(quality_figure(record["cells"]), run_dir / "evaluate.png")
        except InputError as error:
            show(f"no figure: {error}")
    show(f"record: {run_dir}")


def _settings(config: Config) -> list[tuple[dict[str, Any], int | None]]:
    variants = [config.backend.get("variant")] if config.variants is None else config.variants
    ks = [config.experts_k] if config.experts_ks is None else config.experts_ks
    if not variants or not ks:
        raise InputError("variants= and experts_ks= each need at least one value", code="empty_list")
    for key in ("variants", "experts_ks"):
        check_choices(key, getattr(config, key))
    return [({**config.backend, "variant": variant}, k) for variant in variants for k in ks]


@contextmanager
def _reference(config: Config, folder: Path, items: list[Item], announce: Callable[[str], None]) -> Iterator[Reference]:
    if config.reference is not None:
        folder = expand_path(config.reference)
    backend = {key: value for key, value in config.backend.items() if key != "variant"}
    if not (folder / MANIFEST).exists():
        backend = {"_target_": "flashmoe_mlx.backends.checkpoint.CheckpointStore"}
    backend = chosen_backend(backend, folder, config.model, None)
    with load(folder, backend, kernels=config.reference_kernels, prompt_cache_gib=0, on_load=announce) as engine:
        if config.answers and config.constraints:
            check_constraints(engine, items)
        reference = Reference.record(engine, items, _reporter(announce))
    with reference:
        yield reference


def _reporter(announce: Callable[[str], None], prefix: str = "") -> Progress:
    def report(activity: str, done: int, total: int) -> None:
        announce(f"{prefix}{activity}, {done} of {total} items")

    return report


def _cell(setup: Mapping[str, Any], quality: Quality) -> dict[str, Any]:
    answers = [{"kind": answer.item.kind, "right": answer.correct, "text": answer.text} for answer in quality.answers]
    return {"setup": dict(setup), **quality.summary, "said": answers}


def _table(cells: list[dict[str, Any]]) -> Table:
    table = _empty(_HEADINGS)
    for cell in cells:
        text, answers = cell.get("text"), cell.get("answers")
        distance = text or answers
        table.add_row(
            *_setting(cell),
            f"{text['perplexity']:.3f}" if text else "-",
            f"{answers['perplexity']:.3f}" if answers else "-",
            f"{distance['kl']:.4f}" if distance else "-",
            f"{distance['top1_agreement']:.1%}" if distance else "-",
            *(_percent(cell, name) for name in FIGURES),
        )
    return table


def _constraints_table(cells: list[dict[str, Any]]) -> Table:
    """Return two rows for each of ``cells``: the same items answered freely and under constraints."""
    table = _empty(_CONSTRAINTS_HEADINGS)
    for cell in cells:
        for how in ("without", "with"):
            found = cell["constraints"][how]
            table.add_row(
                *_setting(cell),
                how,
                *(_percent(found, name) for name in FIGURES[1:]),
                f"{found['tokens']:,}",
                f"{found['forwards']:,}",
                f"{found['seconds']:.3g}",
            )
    return table


def _empty(headings: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _setting(cell: Mapping[str, Any]) -> tuple[str, str]:
    """Return the variant and K of a row."""
    setup = cell["setup"]
    bits = setup["experts"]["bits"]
    variant = setup["backend"].get("variant") or (f"{bits} bits" if bits else "dense")
    kv_bits = f" kv{setup['kv_bits']}" if setup["kv_bits"] else ""
    return f"{variant}{kv_bits}" + f" {_MARK}" * bool(setup["note"]), str(setup["experts_k"])


def _percent(shares: Mapping[str, Any], name: str) -> str:
    return f"{shares[name]['share']:.1%}" if name in shares else "-"
