"""A thousand requests: every well-formed one is answered, and memory stays flat."""

import importlib.util
import random
import threading
import time
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import psutil
import pytest
from serving import CHAT, SUM, Live

from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.generation.request import RequestOptions, make_request
from flashmoe_mlx.generation.scheduler import Scheduler
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.stores.libc import release_free_memory

_MIB = 2**20


@pytest.fixture
def load_server() -> ModuleType:
    """Return the module ``tools/load_server.py``."""
    spec = importlib.util.spec_from_file_location("load_server", Path(__file__).parents[1] / "tools/load_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.thorough
def test_fifty_clients_of_which_half_are_hostile(load_server: ModuleType) -> None:
    result = load_server.serve_and_load(clients=50, requests=1000, seed=random.randrange(2**20))
    assert result["passed"], result
    assert sum(result["well_formed"].values()) + sum(result["hostile"].values()) == 1000
    assert set(result["well_formed"]) == {"answered"}


def test_an_answer_leaves_no_states_behind(live: Live) -> None:
    """An answer releases its keys, values and states at its end, without the garbage collector."""
    live.chat()
    live.wait_idle()
    engine = live.service.worker.engine
    assert engine is not None
    cache = engine.runner.prompt_cache
    assert cache is not None
    before = mx.get_active_memory() - cache.nbytes
    for stream in (False, True, False, True):
        body = {"model": "demo", "messages": [SUM], "temperature": 0, "stream": stream}
        assert live.client.post(CHAT, json=body).status_code == 200
    live.wait_idle()
    deadline = time.monotonic() + 5
    while mx.get_active_memory() - cache.nbytes > before + 2**16:  # the thread of the engine may still end the answer
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _answer_some(engine: Engine, draw: random.Random, count: int) -> None:
    """Answer ``count`` requests together, half of which are cancelled at random moments, some from another thread."""
    scheduler = Scheduler(engine.runner, together=4)
    for _ in range(count):
        prompt = [draw.randrange(200) for _ in range(draw.randint(1, 60))]
        options: RequestOptions = {"max_tokens": draw.randint(1, 20), "seed": draw.randrange(99)}
        sequence = engine.runner.begin(make_request(prompt, options, engine.sampling, engine.tokenizer))
        scheduler.add(sequence)
        if draw.random() < 0.25:
            _cancel_later(sequence, draw.uniform(0, 0.1))
        while scheduler.unfinished > 4 or (scheduler.unfinished and draw.random() < 0.5):
            with engine.runner.exclusive():
                changed = scheduler.step()
            for progress in changed:
                assert progress.error is None
                if draw.random() < 0.05:
                    progress.sequence.cancel()
    with engine.runner.exclusive():
        while scheduler.unfinished:
            scheduler.step()


def _cancel_later(sequence: Sequence, seconds: float) -> None:
    timer = threading.Timer(seconds, sequence.cancel)
    timer.daemon = True
    timer.start()


@pytest.mark.thorough
def test_memory_is_flat_over_a_thousand_requests_that_are_cancelled_at_random(tiny_pack: Path) -> None:
    draw = random.Random(random.randrange(2**20))
    process = psutil.Process()
    with load(tiny_pack, prompt_cache_gib=4 * _MIB / 2**30) as engine:
        _answer_some(engine, draw, 300)
        cache = engine.runner.prompt_cache
        assert cache is not None
        usage = []
        for _ in range(2):
            release_free_memory()
            usage.append((mx.get_active_memory() - cache.nbytes, process.memory_info().rss, process.num_threads()))
            _answer_some(engine, draw, 350)
        release_free_memory()
        usage.append((mx.get_active_memory() - cache.nbytes, process.memory_info().rss, process.num_threads()))
        assert cache.nbytes <= 4 * _MIB
    arrays, resident, threads = zip(*usage, strict=True)
    assert max(arrays) - arrays[0] < _MIB
    assert max(resident) - resident[0] < 16 * _MIB
    assert max(threads) <= threads[0] + 4
