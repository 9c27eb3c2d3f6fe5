"""Routing traces load exactly as they were saved, or an error says why they do not."""

import itertools
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack_oracle import assert_one_line

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats import trace as trace_module
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.research.traces.random_traces import uniform_trace

HEADER: dict[str, Any] = {
    "tokens": 3,
    "layers": 2,
    "experts_per_token": 2,
    "num_experts": 300,
    "prompt_tokens": 1,
    "model": "Qwen3.5 \u4e2d",
    "prompt_xxh3": "0123456789abcdef",
}
CHOICES = [[[7, 299], [0, 1]], [[5, 7], [2, 0]], [[7, 3], [1, 258]]]


def small_trace() -> RoutingTrace:
    return RoutingTrace(np.array(CHOICES, np.uint16), 300, 1, HEADER["model"], HEADER["prompt_xxh3"])


def signed(data: bytes) -> bytes:
    return data + struct.pack("<Q", xxhash.xxh3_64_intdigest(data))


def content(header: Any = HEADER, choices: Any = CHOICES, magic: bytes = b"MOETRACE", version: int = 1) -> bytes:
    """Return a file in the documented format, with any content."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    numbers = np.array(choices, np.int64).ravel().tolist()
    return signed(magic + struct.pack("<II", version, len(text)) + text + struct.pack(f"<{len(numbers)}H", *numbers))


def load(data: bytes, folder: Path) -> RoutingTrace:
    path = folder / "some.trace"
    path.write_bytes(data)
    return RoutingTrace.load(path)


CODES = ("not_a_trace", "unsupported_version", "damaged_trace", "invalid_trace", "invalid_choice", "trace_too_large")


def assert_refused(data: bytes, folder: Path, code: str | None = None, *facts: str) -> None:
    """Assert that loading ``data`` fails with ``code``, or any code of traces, and that the message holds ``facts``."""
    with pytest.raises(InputError) as caught:
        load(data, folder)
    assert caught.value.code in ([code] if code else CODES)
    assert all(fact in str(caught.value) for fact in facts)
    assert_one_line(caught.value)
    assert str(caught.value).startswith(f"{folder / 'some.trace'}: ")


def assert_same(first: RoutingTrace, second: RoutingTrace) -> None:
    assert first.experts.dtype == second.experts.dtype == np.uint16
    np.testing.assert_array_equal(first.experts, second.experts)
    for name in ("num_experts", "prompt_tokens", "model", "prompt_xxh3"):
        assert getattr(first, name) == getattr(second, name)


# Files


def test_a_file_has_the_documented_format(tmp_path: Path) -> None:
    assert_same(load(content(), tmp_path), small_trace())
    small_trace().save(tmp_path / "saved.trace")
    assert (tmp_path / "saved.trace").read_bytes() == content()
    assert [path.name for path in tmp_path.glob("*.partial")] == []


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_trace_loads_as_it_was_saved(tmp_path: Path, data: st.DataObject) -> None:
    tokens, layers, k = (data.draw(st.integers(1, most)) for most in (6, 4, 5))
    num_experts = data.draw(st.integers(k, 12) | st.integers(k, 2**16) | st.just(2**16))
    chosen = st.lists(st.integers(0, num_experts - 1), min_size=k, max_size=k, unique=True)
    rows = data.draw(st.lists(chosen, min_size=tokens * layers, max_size=tokens * layers))
    saved = RoutingTrace(
        np.array(rows, np.uint16).reshape(tokens, layers, k),
        num_experts,
        data.draw(st.integers(0, tokens)),
        data.draw(st.text().filter(str.isprintable)),
        data.draw(st.just("") | st.integers(0, 2**64 - 1).map(lambda digest: f"{digest:016x}")),
    )
    path = tmp_path / "any.trace"
    saved.save(path)
    assert_same(RoutingTrace.load(path), saved)
    assert path.stat().st_size <= 2 * saved.experts.size + 200 + len(json.dumps(saved.model))


def test_a_reversed_view_is_saved_in_the_order_of_the_view(tmp_path: Path) -> None:
    experts = np.array(CHOICES, np.uint16)[::-1, ::-1]
    RoutingTrace(experts, 300, 0, "", "").save(tmp_path / "view.trace")
    np.testing.assert_array_equal(RoutingTrace.load(tmp_path / "view.trace").experts, experts)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = content()
    choices = len(data) - 8 - 2 * 12
    for end in range(len(data)):
        code = "not_a_trace" if end < 16 else "damaged_trace"
        facts = () if end < choices else (str(end), str(len(data)))
        assert_refused(data[:end], tmp_path, code, *facts)


def test_a_file_with_a_wrong_byte_anywhere_is_refused(tmp_path: Path) -> None:
    data = content()
    for place, wrong in itertools.product(range(len(data)), (0x01, 0x80, 0xFF)):
        assert_refused(data[:place] + bytes([data[place] ^ wrong]) + data[place + 1 :], tmp_path)


@pytest.mark.parametrize("more", [b"\0", bytes(8), bytes(1000)])
def test_a_file_with_trailing_bytes_is_refused(tmp_path: Path, more: bytes) -> None:
    assert_refused(content() + more, tmp_path, "damaged_trace", str(len(content())))
    assert_refused(signed(content()[:-8] + more), tmp_path, "damaged_trace", str(len(content())))


# Files with a correct checksum, as an attacker would write them


@pytest.mark.parametrize(
    ("changes", "code", "fact"),
    [
        ({"num_experts": 299}, "invalid_choice", "token 0 chose an expert not among the 299 in layer 0"),
        ({"num_experts": 1}, "invalid_trace", "2 of 1 experts"),
        ({"num_experts": 2**16 + 1}, "invalid_trace", "2 of 65537 experts"),
        ({"num_experts": 0}, "invalid_trace", "2 of 0 experts"),
        ({"num_experts": -5}, "invalid_trace", "num_experts"),
        ({"prompt_tokens": 4}, "invalid_trace", "a prompt of 4 tokens"),
        ({"prompt_tokens": -1}, "invalid_trace", "prompt_tokens"),
        ({"tokens": 0}, "damaged_trace", "bytes"),
        ({"tokens": 2}, "damaged_trace", "bytes"),
        ({"tokens": 4}, "damaged_trace", "bytes"),
        ({"tokens": -3, "layers": -2}, "invalid_trace", "tokens"),
        ({"tokens": 3.0}, "invalid_trace", "tokens"),
        ({"tokens": True}, "invalid_trace", "tokens"),
        ({"tokens": None}, "invalid_trace", "tokens"),
        ({"tokens": "3"}, "invalid_trace", "tokens"),
        ({"tokens": 2**40}, "invalid_trace", "tokens"),
        ({"tokens": 10**400}, "invalid_trace", "tokens"),
        ({"tokens": 2**32 - 1, "layers": 2**32 - 1, "experts_per_token": 2**32 - 1}, "damaged_trace", "bytes"),
        ({"layers": []}, "invalid_trace", "layers"),
        ({"experts_per_token": {}}, "invalid_trace", "experts_per_token"),
        ({"experts_per_token": 4, "layers": 1, "num_experts": 3}, "invalid_trace", "4 of 3 experts"),
        ({"model": 7}, "invalid_trace", "model"),
        ({"model": None}, "invalid_trace", "model"),
        ({"model": "\x1b[2J"}, "invalid_trace", "name"),
        ({"model": "a\nb"}, "invalid_trace", "name"),
        ({"model": "\ud800"}, "invalid_trace", "name"),
        ({"model": "x" * 1025}, "invalid_trace", "name"),
        ({"prompt_xxh3": "0123"}, "invalid_trace", "hash"),
        ({"prompt_xxh3": "0123456789ABCDEF"}, "invalid_trace", "hash"),
        ({"prompt_xxh3": "0123456789abcdef\n"}, "invalid_trace", "hash"),
        ({"prompt_xxh3": 1}, "invalid_trace", "prompt_xxh3"),
    ],
)
def test_headers_that_contradict_the_file(tmp_path: Path, changes: dict[str, Any], code: str, fact: str) -> None:
    assert_refused(content(HEADER | changes), tmp_path, code, fact)


@pytest.mark.parametrize("name", HEADER)
def test_headers_without_a_required_key(tmp_path: Path, name: str) -> None:
    assert_refused(
        content({key: value for key, value in HEADER.items() if key != name}), tmp_path, "invalid_trace", name
    )


@pytest.mark.parametrize("empty", [{"tokens": 0}, {"layers": 0}, {"tokens": 2**32 - 1, "layers": 2**32 - 1, "K": 0}])
def test_empty_traces(tmp_path: Path, empty: dict[str, int]) -> None:
    changes = {"experts_per_token" if name == "K" else name: size for name, size in empty.items()}
    assert_refused(content(HEADER | {"prompt_tokens": 0} | changes, choices=[]), tmp_path, "invalid_trace")


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (b"", "invalid_trace"),
        (b"[]", "invalid_trace"),
        (b"\xff\xfe", "invalid_trace"),
        (b'{"tokens": NaN}', "invalid_trace"),
        (b'{"tokens": 1' + b"0" * 5000 + b"}", "invalid_trace"),
        (b'{"tokens": 3, "tokens": 3}', "invalid_trace"),
        (b"[" * 60_000, "invalid_trace"),
        (b" " * 70_000, "damaged_trace"),
        (json.dumps(HEADER).encode() + b"{}", "invalid_trace"),
    ],
)
def test_headers_that_are_not_valid_json_objects(tmp_path: Path, header: bytes, code: str) -> None:
    assert_refused(content(header), tmp_path, code)


def test_invalid_choices_are_located(tmp_path: Path) -> None:
    outside, twice = np.array(CHOICES), np.array(CHOICES)
    outside[2, 1, 0] = 300
    assert_refused(content(choices=outside), tmp_path, "invalid_choice", "token 2", "layer 1", "300")
    twice[1, 0] = 5
    assert_refused(content(choices=twice), tmp_path, "invalid_choice", "token 1", "layer 0", "twice")


def test_an_invalid_choice_is_found_late_in_a_long_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = uniform_trace(50, 3, 64, 4, seed=0).experts
    monkeypatch.setattr(trace_module, "_BLOCK", 64)
    RoutingTrace(experts, 64, 0, "", "")
    experts[41, 2, 3] = experts[41, 2, 1]
    with pytest.raises(InputError) as caught:
        RoutingTrace(experts, 64, 0, "", "")
    assert caught.value.code == "invalid_choice"
    assert all(fact in str(caught.value) for fact in ("token 41", "layer 2", "twice"))


def test_other_formats_and_versions_are_refused(tmp_path: Path) -> None:
    for data in (b"", b"MOETRACE", b"PK\x03\x04" + bytes(100), content(magic=b"MOETRACF")):
        assert_refused(data, tmp_path, "not_a_trace")
    assert_refused(content(version=2), tmp_path, "unsupported_version", "version 2", "version 1")


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nosuch", tmp_path / ("x" * 300), Path("/dev/null")):
        with pytest.raises(InputError) as caught:
            RoutingTrace.load(path)
        assert caught.value.code == "cannot_read_trace"
        assert str(path) in str(caught.value)
        assert_one_line(caught.value)
    with pytest.raises(InputError) as caught:
        RoutingTrace.load(tmp_path / "a\0b")
    assert caught.value.code == "cannot_read_trace"


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nosuch" / "a", tmp_path / "file" / "a", tmp_path / ("x" * 300), Path()):
        with pytest.raises(InputError) as caught:
            small_trace().save(path)
        assert caught.value.code == "cannot_write_trace"
        assert_one_line(caught.value)


def test_sizes_are_checked_before_memory_is_allocated(tmp_path: Path) -> None:
    promised = content(HEADER | {"tokens": 2**32 - 1, "layers": 2**16})
    long_header = struct.pack("<8sII", b"MOETRACE", 1, 2**32 - 1) + bytes(100)
    huge = tmp_path / "huge.trace"
    with huge.open("wb") as file:
        file.write(promised)
        file.truncate(2**40)
    tracemalloc.start()
    assert_refused(promised, tmp_path)
    assert_refused(long_header, tmp_path)
    with pytest.raises(InputError) as caught:
        RoutingTrace.load(huge)
    assert caught.value.code == "trace_too_large"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6


def test_a_trace_too_large_to_load_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(content())
    monkeypatch.setattr(trace_module, "_MAX_FILE_BYTES", size)
    assert_same(load(content(), tmp_path), small_trace())
    small_trace().save(tmp_path / "fits.trace")
    monkeypatch.setattr(trace_module, "_MAX_FILE_BYTES", size - 1)
    with pytest.raises(InputError) as caught:
        small_trace().save(tmp_path / "not.trace")
    assert caught.value.code == "trace_too_large"
    assert not (tmp_path / "not.trace").exists()
    assert_refused(content(), tmp_path, "trace_too_large", str(size))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(0, 5) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(st.sampled_from(sorted(HEADER)), JSON, max_size=3),
    choices=st.lists(st.integers(0, 400), min_size=0, max_size=24),
)
def test_any_header_loads_or_is_refused(tmp_path: Path, changes: dict[str, Any], choices: list[int]) -> None:
    try:
        loaded = load(content(HEADER | changes, choices), tmp_path)
    except InputError as error:
        assert_one_line(error)
    else:
        assert loaded.experts.ravel().tolist() == choices


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), start=st.sampled_from([b"", b"MOETRACE", b"MOETRACE\1\0\0\0", content()[:40]]))
def test_any_bytes_are_refused(tmp_path: Path, data: bytes, start: bytes) -> None:
    assert_refused(start + data, tmp_path)
    assert_refused(signed(start + data), tmp_path)


@pytest.mark.parametrize(
    "experts",
    [
        np.zeros((1, 1, 1), np.int64),
        np.zeros((1, 1, 1), np.uint8),
        np.zeros((1, 1, 1), ">u2"),
        np.zeros((1, 1), np.uint16),
        np.zeros((0, 2, 2), np.uint16),
        np.zeros((2, 0, 2), np.uint16),
        np.zeros((2, 2, 0), np.uint16),
    ],
)
def test_arrays_of_a_wrong_type_or_shape(experts: Any) -> None:
    with pytest.raises(InputError) as caught:
        RoutingTrace(experts, 8, 0, "", "")
    assert caught.value.code == "invalid_trace"
    assert_one_line(caught.value)


# Methods


def test_decode_requests_come_token_by_token_and_layer_by_layer() -> None:
    assert list(small_trace().decode_requests()) == [(0, (5, 7)), (1, (2, 0)), (0, (7, 3)), (1, (1, 258))]
    assert all(type(expert) is int for _, experts in small_trace().decode_requests() for expert in experts)
    whole = RoutingTrace(np.array(CHOICES, np.uint16), 300, 3, "", "")
    assert list(whole.decode_requests()) == []


def test_hot_experts_are_in_order_of_use() -> None:
    trace = RoutingTrace(np.array(CHOICES, np.uint16)[:, :, :1] % 8, 8, 1, "", "")
    assert trace.experts[:, 0, 0].tolist() == [7, 5, 7]
    assert trace.hot_experts(0) == [7, 5, 0, 1, 2, 3, 4, 6]
    assert trace.experts[:, 1, 0].tolist() == [0, 2, 1]
    assert trace.hot_experts(1) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert small_trace().hot_experts(0)[:4] == [7, 3, 5, 299]
    assert sorted(small_trace().hot_experts(1)) == list(range(300))
