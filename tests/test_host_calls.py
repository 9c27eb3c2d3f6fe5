"""The work of the host for one token on a CPU, layer by layer.

The counts are upper bounds, so that no call comes unseen; a smaller count is welcome.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import flashmoe_mlx
from flashmoe_mlx.custom_kernels import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension for CPUs was not built")

_PYTHON_CALLS = 350
"""Most functions of Python that one layer calls for a token."""


class CountedExtension:
    """The compiled part; counts the calls of each function."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._native = native.loaded()

    def __getattr__(self, name: str) -> Any:
        function: Callable[..., Any] = getattr(self._native, name)

        def counted(*arguments: Any) -> Any:
            self.calls[name] += 1
            return function(*arguments)

        return counted if callable(function) else function


def test_native_calls_of_a_token(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = CountedExtension()
    with flashmoe_mlx.load(tiny_pack, "resident") as engine:
        cache = engine.new_cache()
        engine.forward([1], cache)
        monkeypatch.setattr(native, "loaded", lambda: counted)
        engine.forward([2], cache)
    layers, attention = engine.model.config.num_layers, counted.calls["attention"]
    assert 0 < attention < layers
    # Two norms; the projections into the mixer, out of it, and the router's; then the head.
    assert counted.calls == {
        "rms_norm": 2 * layers + 1,
        "products": 3 * layers + 1,
        "attention": attention,
        "delta_net": layers - attention,
        "experts": layers,
    }


def test_python_calls_of_a_layer(tiny_pack: Path) -> None:
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:  # the form of a profiler
        nonlocal calls
        calls += event == "call"

    with flashmoe_mlx.load(tiny_pack, "resident") as engine:
        cache = engine.new_cache()
        engine.forward([1], cache)
        sys.setprofile(count)
        try:
            engine.forward([2], cache)
        finally:
            sys.setprofile(None)
    assert calls <= _PYTHON_CALLS * engine.model.config.num_layers
