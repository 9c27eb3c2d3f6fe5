"""Lists of backends on the command line, such as ``backends=[pread,{name:pread,direct:true}]``."""

from collections.abc import Mapping, Sequence
from typing import Any

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.stores.registry import AUTO, backend_settings


def listed_backends(entries: Sequence[Any] | None, default: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the complete settings of each backend by its label.

    Args:
        entries: names of backends, or mappings with a name and options; None: ``default`` alone.
        default: the settings of ``backend=``.

    Raises:
        InputError: an entry is neither a name nor a mapping, is repeated, or there is no such backend.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in [default] if entries is None else entries:
        if isinstance(entry, str):
            entry = {"name": entry}
        if not isinstance(entry, Mapping) or not (entry.get("name") or entry.get("_target_")):
            raise InputError(
                f"backends: {entry!r} is neither a name nor a mapping such as {{name:pread,threads:8}}",
                code="invalid_value",
            )
        options = {str(key): value for key, value in entry.items() if key != "name"}
        name = str(entry.get("name") or "")
        settings = {"_target_": AUTO} if name == AUTO else backend_settings(name) if name else {}
        settings |= options
        name = name or short_name(settings)
        shown = {} if entries is None else options
        label = " ".join([name, *(f"{key}={_shown(value)}" for key, value in shown.items() if key != "_target_")])
        if label in found:
            raise InputError(f"backends: {label} is repeated", code="repeated_value")
        found[label] = settings
    if not found:
        raise InputError("backends=[]: name at least one backend", code="empty_list")
    return found


def short_name(settings: Mapping[str, Any]) -> str:
    """Return the short name of a store with these settings: the module of its class."""
    target = str(settings.get("_target_", ""))
    return target if target == AUTO else target.rpartition(".")[0].rpartition(".")[2]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
