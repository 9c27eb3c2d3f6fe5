"""``task=estimate``: memory, disk space and speed that a model would have on this machine, and possible gains."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from flashmoe_mlx.adapters.config import AdaptedConfig
from flashmoe_mlx.checkpoint.checkpoint import read_config
from flashmoe_mlx.checkpoint.formats import mlx_settings
from flashmoe_mlx.checkpoint.hub import remote_config
from flashmoe_mlx.checkpoint.published import is_plain_name, known_config, published_configs
from flashmoe_mlx.checkpoint.support import is_hub_id, refuse_gguf_file, refuse_named_format, refuse_unsupported
from flashmoe_mlx.console.output import counted, print_table, show
from flashmoe_mlx.custom_kernels import choose
from flashmoe_mlx.custom_kernels.precision import activation_type
from flashmoe_mlx.errors import CheckpointError, FlashMoeError, InputError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.formats.record import AFFINE, GROUP_SIZES, QUANTIZED_BITS, LayerLayouts
from flashmoe_mlx.formats.shares import MOST_NODES
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.formats.untrusted import read_object
from flashmoe_mlx.generation.prompt_cache.size import prompt_cache_bytes
from flashmoe_mlx.made_models.synthetic import FAMILY, synthetic_config
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.research.estimate.machine_profile import MachineProfile
from flashmoe_mlx.research.estimate.prediction import (
    Estimate,
    Machine,
    Model,
    check_trace,
    estimates,
    tolerance,
    what_ifs,
)
from flashmoe_mlx.research.estimate.sizes import DENSE_BITS, GROUP_SIZE, resident_bytes, table_bytes
from flashmoe_mlx.stores.memory import GIB
from flashmoe_mlx.tasks.shared.automatic import machine_profile, stored_profile, usable_memory
from flashmoe_mlx.tasks.shared.keys import TEXT, CommonConfig, ModelChoice
from flashmoe_mlx.tasks.shared.model import cache_folder, model_folder

ESTIMATE_VERSION = 1
_BITS = 4
_CONTEXT = 8192
_MAX_GIB = 2**20
_MAX_SECONDS = 86_400
_NOT_MEASURED = (
    "this machine has not been measured, so no speed is estimated; remove probe=false to measure it in two minutes"
)
_OLD_DAYS = 30
"""Age from which a new measurement of the machine is suggested."""
_MIN_GAIN = 1.03
"""Smallest factor of speed that counts as a gain."""
_INCOMPLETE_CODES = ("no_weights", "missing_shards", "damaged_shard", "incomplete_shard")
"""Codes of errors of an unfinished download, whose configuration suffices for an estimate."""


@dataclass
class Config(CommonConfig):
    """Keys of ``task=estimate``."""

    model: ModelChoice = field(default_factory=ModelChoice)
    experts_k: int | None = None
    nodes: int = 1
    bits: list[int] | None = None
    resident_bits: int | None = None
    context: int | None = None
    kv_bits: int | None = None
    prompt_cache_gib: float | None = None
    trace: str | None = field(default=None, metadata=TEXT)
    memory_gib: float | None = None
    probe: bool | None = None
    probe_seconds: float = 90


def run(config: Config, run_dir: Path) -> None:
    """Show the estimate and write ``estimate.json`` to ``run_dir``."""
    if not 0 < config.probe_seconds < _MAX_SECONDS:
        raise InputError(
            f"probe_seconds={config.probe_seconds}: must be greater than 0 and less than {_MAX_SECONDS}",
            code="out_of_range",
        )
    if not 1 <= config.nodes <= MOST_NODES:
        raise InputError(f"nodes={config.nodes}: must be from 1 to {MOST_NODES} machines", code="out_of_range")
    name, published, folder = _published(config.model)
    memory = _memory(config)
    cache_bytes = prompt_cache_bytes(config.prompt_cache_gib, None if config.memory_gib is None else memory)
    model = replace(_model(config, published, folder), prompt_cache=cache_bytes, nodes=config.nodes)
    record: dict[str, Any] = {"estimate_version": ESTIMATE_VERSION, "model": name, "config": asdict(model.config)}
    record |= {"memory_bytes": memory, "need_bytes": asdict(model.need), "expert_bytes": model.expert_bytes}
    record |= {"nodes": model.nodes, "node_expert_bytes": model.node_bytes}
    for line in _sizes(name, model, memory, cache_folder(config.model)):
        show(line)
    profile = _profile(config) if model.need.total < memory else None
    if profile is not None:
        machine = Machine(profile, memory)
        found = estimates(model, machine)
        changed = [(change, estimates(other, on)) for change, other, on in what_ifs(model, machine)]
        helps = {change: best[0].tokens_per_second for change, best in changed if best}
        for line in _profile_lines(profile):
            show(line)
        if isinstance(model.config, AdaptedConfig):
            show("speeds are those of this package's kernels; mlx-lm computes this model")
        print_table(_table(found))
        for line in _conclusions(model, found, helps):
            show(line)
        record |= {
            "estimates": [asdict(estimate) | {"backend": estimate.backend} for estimate in found],
            "helps": helps,
            "probe": profile.to_json(),
        }
    elif model.need.total < memory:
        show(_NOT_MEASURED)
    write_json(run_dir / "estimate.json", record)
    show(f"record: {run_dir}")


def _published(choice: ModelChoice) -> tuple[str, Mapping[str, Any], Path | None]:
    """Return the model's name, its config.json, and its folder if it has one; download at most config.json.

    Raises:
        InputError: there is no such model, or it is not supported.
        FlashMoeError: the hub cannot be reached, and there is no built-in configuration.
    """
    if choice.path is None:
        if choice.synthetic is None:
            folder = model_folder(choice)
            return f"model={choice.name}", read_config(folder), folder
        return f"model={choice.name}", synthetic_config(choice.synthetic, choice.family or FAMILY), None
    path = expand_path(choice.path)
    if path.is_dir():
        return choice.path, read_config(path), path
    if path.is_file():
        refuse_gguf_file(path)
        if path.suffix != ".json":
            raise InputError(f"model={choice.path}: give the folder of a model, its config.json, or a hub id")
        published: Mapping[str, Any] = read_object(path)
    else:
        published = _published_online(choice.path)
    refuse_unsupported(published, f"model={choice.path}")
    return choice.path, published, None


def _published_online(name: str) -> Mapping[str, Any]:
    """Return the configuration of a published model: a built-in one if the name is unambiguous, or the hub's."""
    if is_hub_id(name):
        refuse_named_format(name)
    known = known_config(name)
    if known is not None and is_plain_name(name):
        return known
    try:
        return remote_config(name, "model")
    except FlashMoeError as error:
        if error.code != "hub_unreachable":
            raise
        if known is None:
            names = ", ".join(published_configs())
            raise FlashMoeError(f"{error}; built-in configurations: {names}", code=error.code) from error
        show(f"the hub cannot be reached; using the sizes of the published model with the same name as {name}")
        return known


def _model(config: Config, published: Mapping[str, Any], folder: Path | None) -> Model:
    geometry = refuse_unsupported(published, "model")
    if isinstance(geometry, AdaptedConfig):
        _refuse_widths(config)
    widths = ", ".join(map(str, QUANTIZED_BITS))
    on_disk = None if folder is None else _layout_on_disk(folder)
    stated, group_size = _find_quantization(published, on_disk)
    all_bits = [stated] if config.bits is None else config.bits
    if len(all_bits) != 1 or all_bits[0] not in QUANTIZED_BITS:
        raise InputError(
            f"bits=[{','.join(map(str, all_bits))}]: choose from {widths}, one at a time: -m bits=[4],[2]",
            code="unknown_choice",
        )
    resident_bits = stated if config.resident_bits is None else config.resident_bits
    is_dense = on_disk is not None and on_disk.single_format is not None and on_disk.single_format.bits is None
    if isinstance(geometry, AdaptedConfig) and is_dense:
        resident_bits = DENSE_BITS  # packs keep the weights of the checkpoint
    elif resident_bits not in QUANTIZED_BITS:
        raise InputError(f"resident_bits={resident_bits}: choose from {widths}")
    trace = None
    if config.trace is not None:
        path = expand_path(config.trace)
        trace = RoutingTrace.load(path)
        check_trace(trace, geometry, str(path))
    k = config.experts_k
    if k is None:
        k = trace.experts.shape[2] if trace is not None else geometry.experts_per_token
    if not 1 <= k <= geometry.num_experts:
        raise InputError(f"experts_k={k}: must be from 1 to {geometry.num_experts}, the experts of this model")
    if trace is not None and k != trace.experts.shape[2]:
        raise InputError(f"experts_k={k}: the trace was recorded with experts_k={trace.experts.shape[2]}")
    context = min(_CONTEXT, geometry.max_context) if config.context is None else config.context
    if not 1 <= context <= geometry.max_context:
        raise InputError(f"context={context}: must be from 1 to {geometry.max_context} tokens")
    activation_bytes = activation_type().size
    if isinstance(geometry, AdaptedConfig):
        activation_bytes = 2  # the type of its weights
    scale_bytes = 2 if choose("auto", kv_bits=config.kv_bits).accepts_any_scale_dtype else activation_bytes
    (bits,) = all_bits
    group_size = group_size if bits == stated else GROUP_SIZE  # otherwise task=pack quantizes the experts
    single = None if on_disk is None else on_disk.single_format
    plain = single is not None and single.mode == AFFINE and isinstance(geometry, ModelConfig)
    return Model(
        geometry,
        bits,
        resident_bits,
        k,
        context,
        activation_bytes,
        scale_bytes,
        trace,
        group_size,
        config.kv_bits,
        layout=None if plain or config.bits is not None else on_disk,
    )


def _refuse_widths(config: Config) -> None:
    """Raise InputError if a key would change the widths of a model that runs through mlx-lm."""
    for key in ("bits", "resident_bits", "kv_bits"):
        if getattr(config, key) is not None:
            raise InputError(
                f"{key}={getattr(config, key)}: this model runs through mlx-lm, with the widths of its checkpoint; "
                "leave it out",
                code="not_for_mlx_lm",
            )


def _find_quantization(published: Mapping[str, Any], layout: LayerLayouts | None) -> tuple[int, int]:
    """Return bits and group size of the experts on disk, of the configuration, or else the defaults of packs.

    The width of experts of several formats is the supported width nearest to their mean.
    """
    if layout is not None and layout.single_format is None:
        return min(QUANTIZED_BITS, key=lambda bits: abs(bits - layout.code_bits)), GROUP_SIZE
    if layout is not None:
        return layout.bits or _BITS, layout.group_size or GROUP_SIZE
    settings = mlx_settings(published)
    bits, group_size = settings.get("bits"), settings.get("group_size")
    if type(bits) is not int or bits not in QUANTIZED_BITS:
        return _BITS, GROUP_SIZE
    return bits, group_size if type(group_size) is int and group_size in GROUP_SIZES else GROUP_SIZE


def _layout_on_disk(folder: Path) -> LayerLayouts | None:
    """Return the record layout of the variant with the most bits in ``folder``; None if the model cannot be run yet.

    A download may be unfinished, and some formats run from a pack only.

    Raises:
        InputError: the model is complete but cannot be run.
    """
    try:
        return open_model(folder).variant(None).layout
    except CheckpointError as error:
        if error.code == "needs_pack":
            return None
        if error.code not in _INCOMPLETE_CODES:
            raise
        show(f"using the bits in config.json: {error}")
        return None


def _memory(config: Config) -> int:
    """Return the bytes that a run may use."""
    if config.memory_gib is not None:
        if not 0 < config.memory_gib < _MAX_GIB:
            raise InputError(
                f"memory_gib={config.memory_gib:g}: must be greater than 0 and less than {_MAX_GIB}",
                code="out_of_range",
            )
        return int(config.memory_gib * GIB)
    return usable_memory()


def _profile(config: Config) -> MachineProfile | None:
    """Return the profile of this machine, measured now if necessary; None if ``probe=false`` forbids it."""
    folder = cache_folder(config.model)
    if config.probe is False:
        return stored_profile(folder)
    return machine_profile(folder, config.probe_seconds, renew=config.probe is True)


def _sizes(name: str, model: Model, memory: int, folder: Path) -> Iterator[str]:
    """Yield lines about the model's sizes, on disk and in memory.

    Args:
        name: the model as the user named it.
        model: the model as it would run.
        memory: usable bytes of memory.
        folder: the cache folder, on whose file system free space is counted.
    """
    geometry, need = model.config, model.need
    resident = resident_bytes(geometry, model.resident_bits, group_size=model.group_size)
    pack = model.node_bytes + resident + table_bytes(geometry)
    yield (
        f"{name}: {geometry.num_moe_layers} layers of {geometry.num_experts} experts, {model.experts_k} per token, "
        f"{model.bits if model.layout is None else round(model.layout.code_bits, 2)} bits"
    )
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    only = "only " if free < pack else ""
    what = "a pack takes" if model.nodes == 1 else f"on each of {model.nodes} machines, a pack with shard= takes"
    yield f"disk: {what} {pack / 1e9:.1f} GB; {only}{free / 1e9:.1f} GB are free in {folder}"
    parts = {
        "resident weights": need.resident,
        f"keys and values of {model.context} tokens": need.keys_and_values,
        "recurrent state": need.state,
        "slots": need.slots,
        "the prompt in a layer": need.prompt,
        "program": need.runtime,
        "earlier prompts": need.prompt_cache,
    }
    listed = ", ".join(f"{part} {nbytes / GIB:.2f}" for part, nbytes in parts.items())
    yield f"memory: at least {need.total / GIB:.2f} GiB: {listed}"
    room = memory - need.total
    if room <= 0:
        yield f"the model does not fit: {memory / GIB:.1f} GiB are usable; fewer bits or a smaller context need less"
    else:
        share = min(1.0, room / model.node_bytes)
        whose = "the" if model.nodes == 1 else "a machine's"
        yield f"the model fits: {room / GIB:.1f} of {memory / GIB:.1f} GiB remain for {share:.0%} of {whose} experts"


def _profile_lines(profile: MachineProfile) -> Iterator[str]:
    age = profile.age_days
    when = (
        "just now" if age < 0.02 else f"{counted(round(age), 'day')} ago" if age >= 1 else f"{24 * age:.1f} hours ago"
    )
    yield f"this machine was measured {when}{'; probe=true measures it again' if age > _OLD_DAYS else ''}"
    for method, reason in profile.missing.items():
        yield f"not measured: {method}: {reason}"


def _table(found: Sequence[Estimate]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("backend", no_wrap=True)
    for heading in ("tok/s", "range", "I/O", "hits", "GiB cached"):
        table.add_column(heading, justify="right", no_wrap=True)
    for estimate in found:
        low, middle, high = (f"{rate:.0%}" for rate in estimate.hit_rates)
        table.add_row(
            estimate.backend,
            f"{estimate.tokens_per_second:.3g}",
            f"{estimate.low:.3g} to {estimate.high:.3g}",
            f"{estimate.reading:.0%}",
            middle if low == high else f"{middle} ({low} to {high})",
            f"{estimate.budget / GIB:.1f}",
        )
    return table


def _conclusions(model: Model, found: Sequence[Estimate], helps: Mapping[str, float]) -> Iterator[str]:
    best = found[0]
    routing = "even or skewed routing, since there is no trace (task=trace records one, trace= uses it)"
    unknown = f", and {routing}" if model.trace is None and best.name != "resident" else ""
    if model.nodes > 1:
        yield (
            f"{model.nodes} machines like this one, with equal shares: of {model.experts_k} experts of a token, the "
            f"busiest machine has {model.experts_on_a_node:.1f} on average; sums over TCP take "
            f"{model.sums * 1e3:.0f} ms"
        )
    yield f"range: {tolerance(best.name):.0%} error of the speed model, spread of the measurement{unknown}"
    gains = {change: rate / best.tokens_per_second for change, rate in helps.items()}
    helpful = sorted((change for change in gains if gains[change] >= _MIN_GAIN), key=lambda change: -gains[change])
    shown = [f"{change} {helps[change]:.3g} tok/s (x{gains[change]:.2f})" for change in helpful]
    rest = [change for change in helps if change not in helpful]
    yield "would help: " + (", ".join(shown) or "none of the changes considered")
    if rest:
        yield f"would not help: {', '.join(rest)}"
