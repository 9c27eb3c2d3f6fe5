"""The typed configuration: what every YAML under ``configs/`` must satisfy, and every override on the command line.

All keys are at the top level. Each task has a dataclass with exactly the keys that it reads; their defaults and
one-line descriptions are in ``configs/task/<name>.yaml`` and ``configs/generation.yaml``. This module imports no MLX.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes


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
    """The verb: a module in ``flashmoe_mlx/tasks/``, whose ``run`` gets the configuration and the run's directory."""

    name: str = MISSING


@dataclass
class CommonConfig:
    """The keys that every task reads."""

    task: TaskChoice = field(default_factory=TaskChoice)
    debug: bool = False


@dataclass
class EngineConfig(CommonConfig):
    """The keys of tasks that run a model with one store."""

    model: ModelChoice = field(default_factory=ModelChoice)
    backend: dict[str, Any] = field(default_factory=dict)
    experts_k: int | None = None
    kernels: str = "auto"


@dataclass
class GenerationConfig(EngineConfig):
    """The keys of tasks that continue one prompt: ``generate`` and ``trace``."""

    prompt: str = "Tell me something about yourself."
    prompt_file: str | None = None
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


@dataclass
class Config(GenerationConfig):
    """Keys of ``task=generate``."""

    prefetch: str = "none"
    profile: bool = False


@dataclass
class TraceConfig(GenerationConfig):
    """Keys of ``task=trace``."""

    out: str | None = None


@dataclass
class BenchConfig(EngineConfig):
    """Keys of ``task=bench``."""

    prefetch: str = "none"
    prompt: str = "Tell me something about yourself."
    prompt_file: str | None = None
    raw: bool = False
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
class EvaluateConfig(EngineConfig):
    """Keys of ``task=evaluate``."""

    variants: list[str] | None = None
    experts_ks: list[int] | None = None
    items: str | None = None
    kinds: list[str] | None = None
    limit: int | None = None
    answers: bool = True
    reference: str | None = None
    reference_kernels: str = "auto"


@dataclass
class BenchIoConfig(CommonConfig):
    """Keys of ``task=bench_io``."""

    model: ModelChoice = field(default_factory=ModelChoice)
    backend: dict[str, Any] = field(default_factory=dict)
    experts_k: int | None = None
    seed: int | None = None
    backends: list[Any] | None = None
    requests: str = "uniform"
    zipf_exponent: float = 1.0
    trace: str | None = None
    tokens: int = 8
    rounds: int = 6
    conditions: list[str] = field(default_factory=lambda: ["cold", "warm"])
    fio: bool = False


@dataclass
class EstimateConfig(CommonConfig):
    """Keys of ``task=estimate``."""

    model: ModelChoice = field(default_factory=ModelChoice)
    experts_k: int | None = None
    bits: list[int] | None = None
    resident_bits: int | None = None
    context: int | None = None
    trace: str | None = None
    memory_gib: float | None = None
    probe: bool | None = None
    probe_seconds: float = 90


@dataclass
class PackConfig(CommonConfig):
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
class SimulateConfig(CommonConfig):
    """Keys of ``task=simulate``."""

    trace: str | None = None
    policies: list[str] = field(default_factory=lambda: ["lru", "lfu", "s3fifo", "pinned", "belady"])
    scopes: list[str] = field(default_factory=lambda: ["layer"])
    slots: list[int] | None = None
    hot: str | None = None
    prefetch_accuracy: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.9])


@dataclass
class DoctorConfig(CommonConfig):
    """Keys of ``task=doctor``: none."""


TASK_CONFIGS: Mapping[str, type[CommonConfig]] = {
    "bench": BenchConfig,
    "bench_io": BenchIoConfig,
    "doctor": DoctorConfig,
    "estimate": EstimateConfig,
    "evaluate": EvaluateConfig,
    "generate": Config,
    "pack": PackConfig,
    "simulate": SimulateConfig,
    "trace": TraceConfig,
}
DEFAULT_TASK = "generate"
TEXT_KEYS = (
    "prompt",
    "prompt_file",
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
    "backend.trace",
)
"""Keys whose value is taken as it stands, whatever characters it has."""


def keys_of(task: str) -> list[str]:
    """Return the top-level keys that ``task`` reads, in the order of its dataclass."""
    return [item.name for item in fields(TASK_CONFIGS[task])]


def known_keys() -> list[str]:
    """Return every top-level key of any task, sorted."""
    return sorted({key for task in TASK_CONFIGS for key in keys_of(task)})
