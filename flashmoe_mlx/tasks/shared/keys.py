"""Keys of the command line that several tasks share, and the marks of keys with special values.

All keys of a task are fields of the class ``Config`` in its module; their defaults and descriptions are in
``configs/task/<name>.yaml`` and ``configs/generation.yaml``. This module must not import MLX: ``--help`` needs it.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes

__all__ = [
    "SHORT_FOR_FILE",
    "TEXT",
    "TRACE_OPTION",
    "WORDS",
    "AnswerConfig",
    "CommonConfig",
    "EngineConfig",
    "GenerationConfig",
    "ModelChoice",
    "PromptCacheConfig",
    "PromptConfig",
    "ServerConfig",
    "StoreConfig",
    "TaskChoice",
    "ToolChoice",
    "cache_options",
    "engine_options",
]

TEXT = {"text": True}
"""Metadata of a field whose value, or whose list of values, is text in which no character has a special meaning."""
TRACE_OPTION = {"text_options": ("trace",)}
"""Metadata of a field with options: the option ``trace`` holds text."""
WORDS = {"words": ("list", "clear", "warm")}
"""Metadata of a field whose values may stand alone: ``list`` means ``action=list``."""
SHORT_FOR_FILE = {"short_for": "file"}
"""Metadata of a group of keys: a value of the group itself is the value of its key ``file``."""


@dataclass
class ModelChoice:
    """Choice of a model: a pack or checkpoint at ``path``, the shipped demo model, or a synthetic model.

    Models that are made on this machine are kept under ``cache_dir``. ``family`` is the ``model_type`` of a synthetic
    model.
    """

    name: str = MISSING
    path: str | None = field(default=None, metadata=TEXT)
    cache_dir: str | None = field(default=None, metadata=TEXT)
    shipped: bool = False
    synthetic: SyntheticSizes | None = None
    family: str | None = field(default=None, metadata=TEXT)


@dataclass
class TaskChoice:
    """Choice of a task, which is the name of a module in ``flashmoe_mlx/tasks/``."""

    name: str = MISSING


@dataclass
class CommonConfig:
    """Keys of every task."""

    task: TaskChoice = field(default_factory=TaskChoice)
    debug: bool = False


@dataclass
class StoreConfig(CommonConfig):
    """Keys of tasks that open an expert store."""

    model: ModelChoice = field(default_factory=ModelChoice)
    backend: dict[str, Any] = field(default_factory=dict, metadata=TRACE_OPTION)
    experts_k: int | None = None


@dataclass
class EngineConfig(StoreConfig):
    """Keys of tasks that run a model."""

    kernels: str = "auto"
    activations: str = "auto"
    kv_bits: int | None = None


def engine_options(config: EngineConfig) -> dict[str, Any]:
    """Return the keys of ``EngineConfig`` as keyword arguments of ``load``."""
    return {"kernels": config.kernels, "activations": config.activations, "kv_bits": config.kv_bits}


@dataclass
class PromptCacheConfig(EngineConfig):
    """Keys of tasks that continue earlier conversations."""

    prompt_cache_gib: float | None = None
    cache_dir: str | None = field(default=None, metadata=TEXT)
    cache_dir_gib: float = 16.0


def cache_options(config: PromptCacheConfig) -> dict[str, Any]:
    """Return the keys of ``PromptCacheConfig`` as keyword arguments of ``load``."""
    return {
        "prompt_cache_gib": config.prompt_cache_gib,
        "cache_dir": config.cache_dir,
        "cache_dir_gib": config.cache_dir_gib,
    }


@dataclass
class NodesKeys:
    """Keys of several machines that run a task together."""

    weights: list[float] | None = None
    timeout: float = 60.0


@dataclass
class NodesConfig(PromptCacheConfig):
    """Keys of tasks that several machines can run together."""

    nodes: NodesKeys = field(default_factory=NodesKeys)


@dataclass
class PromptConfig(EngineConfig):
    """Keys of tasks that send a prompt to a model."""

    prompt: str = field(default="Tell me something about yourself.", metadata=TEXT)
    prompt_file: str | None = field(default=None, metadata=TEXT)
    raw: bool = False


@dataclass
class AnswerConfig(EngineConfig):
    """Keys of tasks in which a model answers."""

    max_tokens: int = 256
    system: str | None = field(default=None, metadata=TEXT)
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
class GenerationConfig(AnswerConfig, PromptConfig):
    """Keys of tasks that answer one prompt: ``generate`` and ``trace``."""

    tools: str | None = field(default=None, metadata=TEXT)
    schema: str | None = field(default=None, metadata=TEXT)
    grammar: str | None = field(default=None, metadata=TEXT)
    regex: str | None = field(default=None, metadata=TEXT)
    choices: list[str] | None = field(default=None, metadata=TEXT)


@dataclass
class ToolChoice:
    """Choice of tools that a model may call in a chat."""

    file: str | None = field(default=None, metadata=TEXT)
    mcp: list[str] = field(default_factory=list, metadata=TEXT)
    builtin: list[str] = field(default_factory=list)
    folder: str = field(default=".", metadata=TEXT)
    allow: list[str] = field(default_factory=list)
    timeout: float = 60.0
    most_calls: int = 16


@dataclass
class ServerConfig:
    """Keys of the HTTP server of ``task=serve``."""

    host: str = field(default="127.0.0.1", metadata=TEXT)
    port: int = 8080
    api_key_file: str | None = field(default=None, metadata=TEXT)
    insecure: bool = False
    names: list[str] = field(default_factory=list, metadata=TEXT)
    origins: list[str] = field(default_factory=list, metadata=TEXT)
    name: str | None = field(default=None, metadata=TEXT)
    aliases: list[str] = field(default_factory=list, metadata=TEXT)
    any_model: bool = True
    queue: int = 64
    together: int = 8
    switch: bool | None = None
    stop_seconds: float = 10.0
