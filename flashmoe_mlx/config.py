"""The typed configuration: what every YAML under ``configs/`` must satisfy, and every override on the command line.

All keys are at the top level. A task's own keys are fields of a subclass, named in ``TASK_CONFIGS``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.pack.synthetic import SyntheticSizes


@dataclass
class ModelChoice:
    """Which model: ``path`` to a pack or checkpoint, or else the one that comes with the package, or a synthetic one.

    What is made here is kept under ``cache_dir``.
    """

    name: str = MISSING
    path: str | None = None
    cache_dir: str | None = None
    shipped: bool = False
    synthetic: SyntheticSizes | None = None


@dataclass
class TaskChoice:
    """The verb: ``_target_`` names the function that gets the configuration and the run's directory."""

    name: str = MISSING
    _target_: str = MISSING


@dataclass
class Config:
    """The keys that every task understands."""

    task: TaskChoice = field(default_factory=TaskChoice)
    model: ModelChoice = field(default_factory=ModelChoice)
    backend: dict[str, Any] = field(default_factory=dict)
    experts_k: int | None = None
    kernels: str = "auto"
    prefetch: str = "none"
    prompt: str = MISSING
    raw: bool = False
    max_tokens: int = 256
    system: str | None = None
    tools: str | None = None
    thinking: bool | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    prefill_chunk: int | None = None
    profile: bool = False
    debug: bool = False


@dataclass
class PackConfig(Config):
    """Keys of ``task=pack``."""

    source: str | None = None
    out: str | None = None
    revision: str | None = None
    bits: list[int] = field(default_factory=lambda: [4])
    group_size: int = 64
    resident_bits: int | None = 4
    quantiser: str | None = None
    packed_experts: str | None = None
    delete_source: bool = False
    verify: bool = False


@dataclass
class BenchConfig(Config):
    """Keys of ``task=bench``."""

    backends: list[Any] | None = None
    experts_ks: list[int] | None = None
    prefetches: list[str] | None = None
    conditions: list[str] = field(default_factory=lambda: ["cold", "warm"])
    prompts: list[str] | None = None
    tokens: int = 16
    rounds: int = 4
    memory_gib: float | None = None
    skip_unavailable: bool = False
    resume: str | None = None
    plot: bool = True


@dataclass
class BenchIoConfig(Config):
    """Keys of ``task=bench_io``."""

    backends: list[Any] | None = None
    requests: str = "uniform"
    zipf_exponent: float = 1.0
    trace: str | None = None
    tokens: int = 8
    rounds: int = 6
    conditions: list[str] = field(default_factory=lambda: ["cold", "warm"])
    fio: bool = False


@dataclass
class TraceConfig(Config):
    """Keys of ``task=trace``."""

    out: str | None = None


@dataclass
class SimulateConfig(Config):
    """Keys of ``task=simulate``."""

    trace: str | None = None
    policies: list[str] = field(default_factory=lambda: ["lru", "lfu", "s3fifo", "pinned", "belady"])
    scopes: list[str] = field(default_factory=lambda: ["layer"])
    slots: list[int] | None = None
    hot: str | None = None
    prefetch_accuracy: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.9])


@dataclass
class EstimateConfig(Config):
    """Keys of ``task=estimate``."""

    bits: list[int] | None = None
    resident_bits: int | None = None
    context: int | None = None
    trace: str | None = None
    memory_gib: float | None = None
    probe: bool | None = None
    probe_seconds: float = 90


@dataclass
class EvaluateConfig(Config):
    """Keys of ``task=evaluate``."""

    variants: list[str] | None = None
    experts_ks: list[int] | None = None
    items: str | None = None
    kinds: list[str] | None = None
    limit: int | None = None
    answers: bool = True
    reference: str | None = None
    reference_kernels: str = "auto"


TASK_CONFIGS: Mapping[str, type[Config]] = {
    "bench": BenchConfig,
    "bench_io": BenchIoConfig,
    "doctor": Config,
    "estimate": EstimateConfig,
    "evaluate": EvaluateConfig,
    "generate": Config,
    "pack": PackConfig,
    "simulate": SimulateConfig,
    "trace": TraceConfig,
}
TEXT_KEYS = (
    "prompt",
    "system",
    "tools",
    "source",
    "out",
    "revision",
    "packed_experts",
    "trace",
    "hot",
    "items",
    "reference",
    "resume",
    "model.path",
    "model.cache_dir",
)
"""Keys whose value is taken as it stands, whatever characters it has."""


def known_keys() -> list[str]:
    """Every key that the top level may have, in any task."""
    return sorted({item.name for config in TASK_CONFIGS.values() for item in fields(config)})


def typed(composed: DictConfig) -> Config:
    """Check a composed configuration and make it an object.

    Raises:
        InputError: a value has the wrong type, or a key is not known to this task.
    """
    task = str(OmegaConf.select(composed, "task.name"))
    config_type = TASK_CONFIGS.get(task, Config)
    known = {item.name for item in fields(config_type)}
    for key in map(str, composed):
        if key not in known:
            raise InputError(f"{key}: task={task} has no such key")
    schema = OmegaConf.structured(config_type)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, composed))
    except OmegaConfBaseException as error:
        raise InputError(_explained(error, composed, config_type)) from error
    assert isinstance(config, Config)
    return config


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[int]: "a list such as [4,2]",
    list[str]: "a list such as [a,b]",
}


def _explained(error: OmegaConfBaseException, composed: DictConfig, config_type: type[Config]) -> str:
    key = error.full_key or ""
    hint = get_type_hints(config_type).get(key)
    kinds = [_KINDS[kind] for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)) if kind in _KINDS]
    if not kinds:
        return f"{key or 'configuration'}: {str(error.msg or error).splitlines()[0]}"
    nullable = " or null" if NoneType in get_args(hint) else ""
    return f"{key}={OmegaConf.select(composed, key)}: must be {' or '.join(kinds)}{nullable}"


def folder_of(text: str) -> Path:
    """A path that a person gave, ``~`` included.

    Raises:
        InputError: there is nothing but blanks.
    """
    if not text.strip():
        raise InputError("a path is empty; give one, or leave its key out")
    return Path(text).expanduser()
