"""The backends by name, and functions that open a store from a name and options."""

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from importlib.resources import files as package_files
from typing import Any, Protocol

import yaml

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.manifest import PackedExperts
from flashmoe_mlx.formats.shares import Share, SharedSource
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.mirrors import open_mirrors
from flashmoe_mlx.stores.slots import slots_for

AUTO = "auto"
"""The name in place of a backend that stands for the best backend; only tasks know it, since it needs measurements."""


def backend_names() -> list[str]:
    """Return the names of the backends of this package, one for each file in ``configs/backend/`` but ``auto``."""
    folder = package_files("flashmoe_mlx.configs").joinpath("backend")
    names = (entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return sorted(name for name in names if name != AUTO)


def backend_settings(name: str) -> dict[str, Any]:
    """Return ``_target_``, the class of a backend, and the default options.

    Raises:
        InputError: there is no such backend (code "unknown_backend").
    """
    if name == AUTO:
        raise InputError(
            "backend=auto needs measurements of this machine: on the command line, write backend=auto; in Python, pass "
            "the settings that research.estimate.automatic.choose_backend returns",
            code="unknown_backend",
        )
    if name not in backend_names():
        raise InputError(
            f"backend={name}: no such backend; there are {', '.join(backend_names())}", code="unknown_backend"
        )
    text = package_files("flashmoe_mlx.configs").joinpath("backend", f"{name}.yaml").read_text()
    settings = yaml.safe_load(text)
    return {str(key): value for key, value in settings.items()}


class HasVariants(Protocol):
    """A model with one or more variants of its routed experts."""

    def variant(self, name: str | None) -> ExpertSource:
        """Return the experts of the variant ``name``, or of the widest variant if it is None."""
        ...


def open_store(
    files: HasVariants,
    backend: str | Mapping[str, Any],
    options: Mapping[str, Any],
    host_kernels: bool | None = None,
    share: Share | None = None,
) -> tuple[ExpertStore, dict[str, Any]]:
    """Open a store for the routed experts of ``files``; return the store and all its settings.

    Args:
        files: the model.
        backend: name of a file in ``configs/backend/``, or a mapping with ``_target_`` and options.
        options: options that override those of ``backend``. ``variant`` names the variant of the pack, and ``mirrors``
            folders with copies of it; all other options go to the constructor of the store.
        host_kernels: whether the kernels of routed experts read ``ExpertBatch.host``; None: as with ``kernels=auto``.
        share: the experts of this node, where several nodes share the experts; None for all.

    Raises:
        InputError: there is no such backend, option, or variant (codes "unknown_backend", "unknown_option",
            "unknown_variant"), ``mirrors`` are not copies of the pack, or the store refuses its options.
    """
    if not isinstance(backend, str | Mapping):
        raise InputError(
            f"backend={backend}: must be one name, or a mapping with _target_ and options", code="unknown_backend"
        )
    settings = backend_settings(backend) if isinstance(backend, str) else dict(backend)
    settings |= options
    complete = dict(settings)
    source = files.variant(settings.pop("variant", None))
    with slots_for(host_kernels):
        return create_store(source, settings, share), complete


def create_store(source: ExpertSource, settings: Mapping[str, Any], share: Share | None = None) -> ExpertStore:
    """Create a store for ``source``.

    ``settings`` holds the class as ``_target_``, ``mirrors``, and the options of the constructor. ``share`` is as for
    ``open_store``.

    Raises:
        InputError: there is no such class or option (codes "unknown_backend", "unknown_option"), ``mirrors`` are not
            copies of the source, the store refuses its options, or a pack with one node's share is opened by another
            node (code "another_share") or by one machine alone ("share_alone").
    """
    options = dict(settings)
    target, mirrors = options.pop("_target_", None), options.pop("mirrors", None)
    if not isinstance(target, str):
        raise InputError(
            "backend: _target_ must name the class of a store, for instance my_package.my_module.MyStore",
            code="unknown_backend",
        )
    try:
        module, _, name = target.rpartition(".")
        store_class = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise InputError(
            f"backend: cannot import {target}: {' '.join(str(error).split())}", code="unknown_backend"
        ) from error
    if not (isinstance(store_class, type) and issubclass(store_class, ExpertStore)):
        raise InputError(f"backend: {target} is not a subclass of ExpertStore", code="unknown_backend")
    _check_options(store_class, options)
    _refuse_other_share(source, share)
    source = open_mirrors(source, mirrors)
    store: ExpertStore = store_class(source if share is None else SharedSource(source, share), **options)
    return store


def _refuse_other_share(source: ExpertSource, share: Share | None) -> None:
    packed = source.packed if isinstance(source, PackedExperts) else None
    if packed is None:
        return
    if share is None:
        raise InputError(
            f"this pack holds only {packed}; start all nodes with mlx.launch, or use a pack with all experts",
            code="share_alone",
        )
    if not packed.owns_as(share, source.num_layers, source.num_experts):
        raise InputError(
            f"this pack holds {packed}, but this process needs {share}; copy the right pack to this machine, or give "
            "the same nodes.weights as weights= of task=pack",
            code="another_share",
        )


def _check_options(store_class: type[ExpertStore], options: Mapping[str, Any]) -> None:
    hints = typing.get_type_hints(store_class.__init__)
    known = [name for name in inspect.signature(store_class).parameters if name != "source"]
    for name, value in options.items():
        if name not in known:
            options_here = [*known, "variant", "mirrors"]
            nearest = difflib.get_close_matches(name, options_here, n=1)
            hint = f"did you mean backend.{nearest[0]}? " if nearest else ""
            raise InputError(
                f"backend.{name}: no such option; {hint}{store_class.__name__} has {', '.join(options_here)}",
                code="unknown_option",
            )
        limit = store_class.limits.get(name)
        if limit is not None and not (value is None and _fits(None, hints.get(name))):
            limit.check(name, value)
        if not _fits(value, hints.get(name)):
            raise InputError(
                f"backend.{name}={value}: must be {_type_name(hints[name])}", code="option_of_another_type"
            )


def _fits(value: Any, hint: Any) -> bool:
    """Return whether ``value`` has the type ``hint``; types other than plain types and their unions match any value."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, bool, str, type(None)):
        return type(value) is hint
    return True


def _type_name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    options = typing.get_args(hint) or (hint,)
    return " or ".join(names.get(option, str(option)) for option in options)
