"""Every option of every backend has an effect: on counters, on the calls of the system, or on the slots."""

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class
from systems import WHY_NO_IO_URING

from flashmoe_mlx.backends import mmap as mmap_backend
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.research.traces.random_traces import zipf_trace
from flashmoe_mlx.stores import thread_reader, uring_reader
from flashmoe_mlx.stores.registry import backend_names, backend_settings, create_store
from flashmoe_mlx.testing.stored_experts import EXPERTS, LAYERS, StoredExperts, write_experts

CHANGES: dict[str, dict[str, Any]] = {
    "pread": {"slots": 5, "threads": 1, "chunk_mib": 1, "direct": True, "readahead": False},
    "io_uring": {"slots": 5, "depth": 1, "chunk_mib": 1, "direct": False, "workers": True, "registered": True},
    "mmap": {"slots": 5, "advice": "random", "populate": False},
    "checkpoint": {"slots": 5, "reader": "io_uring", "depth": 1},
    "pack2": {"slots": 5, "reader": "io_uring", "depth": 1, "direct": True},
    "resident": {"reader": "io_uring", "depth": 1},
    "ram_hybrid": {
        "budget_gib": 1.0, "memory_share": 0.9, "policy": "lfu", "trace": "a trace", "slots": 2, "reader": "io_uring",
        "depth": 1, "direct": True, "preload": True,
    },
}  # fmt: skip
"""A value for each option, other than its default."""
COMMON = {"_target_", "variant", "mirrors"}  # tested by test_pack_open.py and test_mirrors.py
OPTIONS = [pytest.param(name, option, id=f"{name}.{option}") for name, own in CHANGES.items() for option in own]


def test_every_option_is_listed() -> None:
    assert CHANGES.keys() == set(backend_names())
    for name, changes in CHANGES.items():
        assert changes.keys() == backend_settings(name).keys() - COMMON, name


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, StoredExperts]:
    return {
        name: write_experts(tmp_path_factory.mktemp("experts"), 2 if name == "pack2" else 4, name != "checkpoint")
        for name in ("pack", "pack2", "checkpoint")
    }


@pytest.mark.parametrize(("backend", "option"), OPTIONS)
@pytest.mark.sampled(16)
def test_an_option_has_an_effect(
    backend: str, option: str, stored: Mapping[str, StoredExperts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = CHANGES[backend][option]
    if WHY_NO_IO_URING and (backend == "io_uring" or value == "io_uring"):
        pytest.skip(WHY_NO_IO_URING)
    experts = stored.get(backend, stored["pack"])
    settings = {key: own for key, own in backend_settings(backend).items() if key not in ("variant", "mirrors")}
    changed = settings | {option: value}
    if backend == "ram_hybrid":
        records = experts.source.layout.bytes_in_all_layers
        small = {"budget_gib": 6 * records / 2**30}
        if option == "memory_share":
            monkeypatch.setattr("flashmoe_mlx.backends.ram_hybrid.available_memory", lambda: 8 * records)
        else:
            settings, changed = settings | small, small | changed if option == "budget_gib" else changed | small
        if option == "trace":
            zipf_trace(20, LAYERS, EXPERTS, 3, 1.0, seed=1).save(tmp_path / "a.moetrace")
            changed |= {"trace": str(tmp_path / "a.moetrace"), "policy": "pinned"}
    assert observed(experts, settings, monkeypatch) != observed(experts, changed, monkeypatch)


def observed(experts: StoredExperts, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what a store with ``settings`` does in a fixed sequence of fetches."""
    calls: set[Any] = set()
    running = most = 0
    lock = threading.Lock()

    def spy(owner: Any, name: str, describe: Any) -> None:
        original = getattr(owner, name)

        def called(*arguments: Any, **named: Any) -> Any:
            calls.add((name, describe(*arguments, **named)))
            return original(*arguments, **named)

        patch.setattr(owner, name, called)

    with monkeypatch.context() as patch:
        spy(os, "open", lambda _, flags, *__: flags)
        spy(os, "posix_fadvise", lambda *arguments: arguments[-1])
        spy(thread_reader, "plan_reads", lambda *arguments: arguments[3])
        spy(uring_reader, "plan_reads", lambda *arguments: arguments[3])
        spy(uring_reader.Ring, "__init__", lambda _, *arguments: arguments)
        spy(uring_reader.Ring, "register_buffers", lambda _, buffers: len(buffers))
        spy(mmap_backend._Mapping, "__init__", lambda _, __, ___, advice: advice)
        spy(mmap_backend._Mapping, "populate", lambda *_: None)
        read = os.preadv

        def slow(*arguments: Any) -> int:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.002)
            with lock:
                running -= 1
            return read(*arguments)

        patch.setattr(os, "preadv", slow)
        with create_store(experts.source, settings) as store:
            trace: RoutingTrace = zipf_trace(30, LAYERS, EXPERTS, 2, 1.0, seed=2)
            for token in trace.experts.tolist():
                for layer, chosen in enumerate(token):
                    store.fetch(layer, chosen)
            stats = store.stats()
            counters = stats.hits, stats.misses, stats.evictions, stats.reads, stats.bytes_read
            assert isinstance(store, get_class(settings["_target_"]))
            return [store.slots, counters, calls, most]
