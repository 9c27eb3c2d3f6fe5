"""Generations of one engine: threads, interleaving, cancellation, progress, thinking, and the growth of caches."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY
from tiny_checkpoints import GEOMETRIES, write_checkpoint

import flashmoe_mlx
from flashmoe_mlx import Generation
from flashmoe_mlx.console.tables import metrics_lines
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import EngineBusyError, FlashMoeError, InputError
from flashmoe_mlx.generation import sequence as sequence_module
from flashmoe_mlx.made_models.byte_tokenizer import write_byte_tokenizer
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.models.decoder import Model
from flashmoe_mlx.moe.prefetch import POLICIES
from flashmoe_mlx.research.quality.evaluation import evaluate
from flashmoe_mlx.research.quality.items import Item
from flashmoe_mlx.research.traces.recorder import recorded

PROMPT = "Hello, store"
THINKING_TEMPLATE = """
{%- if enable_thinking is defined and not enable_thinking and refuses is defined %}
    {{- raise_exception("Disabling thinking is not supported.") }}
{%- endif %}
{%- for message in messages %}{{- message.role + ': ' + message.content + '\\n' }}{%- endfor %}
{%- for tool in tools or [] %}{{- tool.function.name + '\\n' }}{%- endfor %}
{{- effort if effort is defined }}
{{- '<think>\\n' }}
{{- '\\n</think>\\n\\n' if enable_thinking is defined and enable_thinking is false }}
"""


@pytest.fixture
def engine(tiny_pack: Path) -> Iterator[Engine]:
    with flashmoe_mlx.load(tiny_pack, prompt_cache_gib=0) as opened:
        yield opened


def checkpoint(folder: Path, template: str | None = None, settings: dict[str, Any] | None = None) -> Path:
    write_checkpoint(folder, replace(GEOMETRIES["plain"], vocab_size=320), 0)
    write_byte_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("thinking") / "model", THINKING_TEMPLATE, {})


def tokens_of(generation: Generation) -> list[int]:
    return [token for piece in generation for token in piece.token_ids]


# Threads


@pytest.mark.parametrize(
    "call",
    [
        lambda engine, _: engine.forward([1], engine.new_cache()),
        lambda engine, _: engine.logits([1, 2]),
        lambda engine, _: next(engine.generate(PROMPT)),
        lambda _, generation: next(generation),
        lambda engine, _: engine.observe_routing(None),
        lambda engine, _: engine.close(),
    ],
)
@pytest.mark.sampled(3)
def test_a_second_thread_is_refused(engine: Engine, call: Callable[[Engine, Generation], object]) -> None:
    expected = tokens_of(engine.generate(PROMPT, max_tokens=6))
    inside, proceed = threading.Event(), threading.Event()

    def wait(done: int, total: int) -> None:
        inside.set()
        assert proceed.wait(60)

    generation = engine.generate(PROMPT, max_tokens=6, on_prefill=wait)
    with ThreadPoolExecutor(1) as worker:
        answer = worker.submit(tokens_of, generation)
        try:
            assert inside.wait(60)
            with pytest.raises(EngineBusyError) as raised:
                call(engine, generation)
            assert raised.value.code == "engine_busy"
        finally:
            proceed.set()
        assert answer.result() == expected
    assert tokens_of(engine.generate(PROMPT, max_tokens=6)) == expected


def test_an_interrupt_cannot_leave_the_engine_locked(engine: Engine) -> None:
    """No signal handler can run between the steps in which ``with`` takes and releases a lock implemented in C."""
    context = engine.runner.exclusive()
    assert isinstance(context, type(threading.Lock()))
    assert not context.locked()


def test_a_refused_step_can_be_repeated(engine: Engine) -> None:
    expected = tokens_of(engine.generate(PROMPT, max_tokens=8))
    results: dict[int, list[int]] = {}

    def patient(number: int) -> None:
        generation, found = engine.generate(PROMPT, max_tokens=8), list[int]()
        while True:
            try:
                found += next(generation).token_ids
            except EngineBusyError:
                time.sleep(0.001)
            except StopIteration:
                break
        results[number] = found

    threads = [threading.Thread(target=patient, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == dict.fromkeys(range(3), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_interleaved_generations_keep_their_answers_and_measurements(tiny_pack: Path, policy: str) -> None:
    prompts = ("Hello, store", "Something else, and longer")

    def counts(generation: Generation) -> dict[str, Any]:
        stats = generation.stats()
        stages = {
            (stage, name): stats[stage][name]
            for stage in ("prefill", "decode")
            for name in ("tokens", "experts_requested", "misses")
        }
        return {**stages, "guesses": stats["guesses"], "reason": stats["finish_reason"]}

    with flashmoe_mlx.load(tiny_pack, prefetch=policy, prompt_cache_gib=0) as engine:
        alone = []
        for prompt in prompts:
            generation = engine.generate(prompt, max_tokens=9, ignore_eos=True)
            alone.append((tokens_of(generation), counts(generation)))
        generations = [engine.generate(prompt, max_tokens=9, ignore_eos=True) for prompt in prompts]
        found: list[list[int]] = [[], []]
        open_ones = {0, 1}
        while open_ones:
            for index in sorted(open_ones):
                piece = next(generations[index], None)
                engine.forward([1], engine.new_cache())  # belongs to neither
                if piece is None:
                    open_ones.remove(index)
                else:
                    found[index] += piece.token_ids
        assert [(tokens, counts(generation)) for tokens, generation in zip(found, generations, strict=True)] == alone


# Cancellation and progress


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_progress_through_the_prompt(engine: Engine, chunk: int | None) -> None:
    reports: list[tuple[int, int]] = []
    generation = engine.generate(
        PROMPT, max_tokens=1, prefill_chunk=chunk, on_prefill=lambda done, total: reports.append((done, total))
    )
    assert not reports
    list(generation)
    total = len(engine.encode(PROMPT))
    assert {of for _, of in reports} == {total}
    done = [tokens for tokens, _ in reports]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, total)
    assert len(done) == -(-total // (chunk or total)) * TINY.num_layers + 1


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_cancelling_in_the_prompt_ends_before_the_next_layer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    expected = tokens_of(engine.generate(PROMPT, max_tokens=4))
    fetched: list[int] = []
    fetch = engine.store.fetch
    monkeypatch.setattr(engine.store, "fetch", lambda of, *rest: (fetched.append(of), fetch(of, *rest))[1])
    calls = 0

    def cancel_there(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == TINY.num_layers + layer + 1:  # in the second chunk
            generation.cancel()

    generation = engine.generate(PROMPT, prefill_chunk=4, on_prefill=cancel_there)
    pieces = list(generation)
    assert [(piece.text, piece.token_ids, piece.finish_reason) for piece in pieces] == [("", (), "cancelled")]
    assert fetched == [*range(TINY.num_layers), *range(layer)]
    assert generation._sequence.cache.broken == (layer > 0)
    stats = generation.stats()
    assert (stats["finish_reason"], stats["time_to_first_token"], stats["prefill"]["tokens"]) == ("cancelled", None, 4)
    assert next(iter(metrics_lines(stats))) == "interrupted before the first token"
    assert next(generation, None) is None
    assert tokens_of(engine.generate(PROMPT, max_tokens=4)) == expected


def test_cancelling_before_between_and_after(engine: Engine) -> None:
    generation = engine.generate(PROMPT)
    generation.cancel()
    assert [piece.finish_reason for piece in generation] == ["cancelled"]
    assert engine.store.stats().fetches == 0

    generation = engine.generate(PROMPT, ignore_eos=True)
    first = next(generation)
    generation.cancel()
    rest = list(generation)
    assert (first.finish_reason, [piece.finish_reason for piece in rest]) == (None, ["cancelled"])

    generation = engine.generate(PROMPT, max_tokens=3)
    pieces = list(generation)
    generation.cancel()
    assert next(generation, None) is None
    assert pieces[-1].finish_reason == generation.metrics.finish_reason == "length"


def test_cancelling_from_another_thread_while_decoding(engine: Engine) -> None:
    generation = engine.generate(PROMPT, max_tokens=200, ignore_eos=True)
    begun = threading.Event()

    def run() -> list[str | None]:
        reasons = []
        for piece in generation:
            begun.set()
            reasons.append(piece.finish_reason)
        return reasons

    with ThreadPoolExecutor(1) as worker:
        reasons = worker.submit(run)
        assert begun.wait(60)
        generation.cancel()
        found = reasons.result(60)
    assert found[-1] == "cancelled"
    assert generation.metrics.decode.tokens < 199


def test_cancelling_in_the_last_layer_is_followed_by_the_last_piece(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = engine.generate(PROMPT, ignore_eos=True)
    first = next(generation)
    fetch = engine.store.fetch

    def cancel_there(layer: int, *rest: Any) -> Any:
        if layer == TINY.num_layers - 1:
            generation.cancel()
        return fetch(layer, *rest)

    monkeypatch.setattr(engine.store, "fetch", cancel_there)
    pieces = list(generation)
    assert first.finish_reason is None
    assert [piece.finish_reason for piece in pieces] == ["cancelled"]


def test_cancelled_text_is_not_lost(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A character whose bytes are not complete, and the tokens behind it, are in the last piece."""
    scripted(monkeypatch, "aé".encode())
    generation = engine.generate(PROMPT)
    pieces = [next(generation)]

    def cancel(*_: object) -> None:
        generation.cancel()

    detokenizer = generation._text._detokenizer
    monkeypatch.setattr(detokenizer, "add", lambda token, add=detokenizer.add: (cancel(), add(token))[1])
    pieces += generation
    assert [piece.token_ids for piece in pieces] == [(0x61,), (0xC3,)]
    assert "".join(piece.text for piece in pieces) == "a\ufffd"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("chunk", [None, 4])
def test_an_error_in_a_pass_leaves_the_engine_usable(
    engine: Engine, error: type[BaseException], chunk: int | None
) -> None:
    expected = tokens_of(engine.generate(PROMPT, max_tokens=4))

    def fail(done: int, total: int) -> None:
        if done > 5:
            raise error

    generation = engine.generate(PROMPT, prefill_chunk=chunk, on_prefill=fail)
    with pytest.raises(error):
        next(generation)
    assert next(generation, None) is None
    assert tokens_of(engine.generate(PROMPT, max_tokens=4)) == expected


def test_closing_leaves_no_piece(engine: Engine) -> None:
    generation = engine.generate(PROMPT)
    next(generation)
    generation.close()
    assert next(generation, None) is None


def test_closing_during_a_step_leaves_no_further_piece(engine: Engine) -> None:
    generation = engine.generate(PROMPT, logits_processors=[lambda logits, _: (generation.close(), logits)[1]])
    pieces = list(generation)
    assert len(pieces) == 1
    assert next(generation, None) is None


@pytest.mark.parametrize(("chunk", "kept"), [(None, 0), (4, 4)])
def test_a_trace_of_a_pass_that_was_cut_short_has_no_layers_missing(
    engine: Engine, chunk: int | None, kept: int
) -> None:
    prompt = engine.encode(PROMPT)
    calls = 0

    def cancel_in_the_last_layer(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == TINY.num_layers * (2 if kept else 1):
            generation.cancel()

    with recorded(engine) as recorder:
        generation = engine.generate(PROMPT, prefill_chunk=chunk, on_prefill=cancel_in_the_last_layer)
        list(generation)
    if kept:
        assert recorder.trace(TINY.num_experts, prompt).experts.shape[:2] == (kept, TINY.num_layers)
        return
    with pytest.raises(InputError) as raised:
        recorder.trace(TINY.num_experts, prompt)
    assert raised.value.code == "nothing_recorded"


# Guesses and divisions


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("prompt", "chunk"), [("a", None), ("abc", 1), ("abc", None)])
@pytest.mark.parametrize("max_tokens", [1, 2, 5])
@pytest.mark.sampled(10)
def test_guesses_are_counted_by_phase(
    tiny_pack: Path, policy: str, prompt: str, chunk: int | None, max_tokens: int
) -> None:
    with flashmoe_mlx.load(tiny_pack, prefetch=policy, prompt_cache_gib=0) as engine:
        generation = engine.generate(
            prompt, raw=True, max_tokens=max_tokens, temperature=0, prefill_chunk=chunk, ignore_eos=True
        )
        list(generation)
        stats = generation.stats()
    assert list(metrics_lines(stats))
    if policy == "none":
        assert stats["guesses"] is None
        return
    layers, steps = TINY.num_layers, max_tokens - 1
    counted = {
        "early_router": steps * layers,
        "next_router": steps * (layers - 1),
        "previous_token": max(steps * layers - 1, 0),  # the first layer after the prompt
    }
    assert stats["guesses"]["predicted"] == counted[policy] * TINY.experts_per_token


# Logits from which no token can be chosen


@pytest.mark.parametrize(("value", "place"), [(np.nan, 3), (np.inf, 3), (-np.inf, slice(None))])
def test_bad_logits_are_refused_by_every_caller(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, value: float, place: int | slice
) -> None:
    compute = Model.logits

    def bad(model: Model, hidden: mx.array) -> mx.array:
        logits = np.array(compute(model, hidden))
        logits[-1, place] = value
        return mx.array(logits)

    def generate(**options: Any) -> object:
        return list(engine.generate(PROMPT, **options))

    monkeypatch.setattr(Model, "logits", bad)
    calls: list[Callable[[], object]] = [
        lambda: engine.logits([1, 2, 3]),
        lambda: engine.forward([1], engine.new_cache()),
        generate,
        lambda: generate(temperature=1.0, seed=0),
        lambda: generate(repetition_penalty=1.1),
        lambda: evaluate(engine, [Item("text", text="Hello")], generate=False),
    ]
    for call in calls:
        with pytest.raises(FlashMoeError) as raised:
            call()
        assert raised.value.code == "bad_logits"
    monkeypatch.undo()
    assert generate(max_tokens=2)


# Thinking


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int]) -> None:
    """Let the model say ``tokens``."""
    spoken = iter(tokens)

    class Scripted:
        can_choose_on_device = False

        def __init__(self, *_: object) -> None:
            pass

        def __call__(self, *_: object) -> int:
            return next(spoken)

    monkeypatch.setattr(sequence_module, "Sampler", Scripted)


def test_thinking_is_separated_from_the_answer(thinking_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flashmoe_mlx.load(thinking_model) as engine:
        text = "Let me see.\n</think>\n\nIt is 4."
        spoken = engine.tokenizer.encode(text)
        scripted(monkeypatch, spoken)
        generation = engine.generate("2 + 2?", max_tokens=len(spoken))
        pieces = list(generation)
        assert "".join(piece.reasoning for piece in pieces).strip() == "Let me see."
        assert "".join(piece.text for piece in pieces) == "It is 4."
        assert [token for piece in pieces for token in piece.token_ids] == spoken
        assert not generation.thinking

        scripted(monkeypatch, spoken)
        generation = engine.generate("2 + 2?", max_tokens=8)
        pieces = list(generation)
        assert generation.thinking
        assert pieces[-1].finish_reason == "length"
        assert "".join(piece.text for piece in pieces) == ""
        assert "".join(piece.reasoning for piece in pieces) == "Let me s"

        scripted(monkeypatch, spoken)  # raw text is not searched
        pieces = list(engine.generate("<think>\n", raw=True, max_tokens=len(spoken)))
        assert "".join(piece.text for piece in pieces) == text


def test_thinking_is_switched_by_the_template(thinking_model: Path) -> None:
    with flashmoe_mlx.load(thinking_model) as engine:

        def sent(prompt: Any = "Hi", **options: Any) -> str:
            return engine.tokenizer.decode(engine.encode(prompt, **options))

        assert sent() == sent(enable_thinking=True) == "user: Hi\n<think>\n"
        assert sent(enable_thinking=False) == "user: Hi\n<think>\n\n</think>\n\n"
        assert sent(template_options={"enable_thinking": False}) == sent(enable_thinking=False)
        assert sent(system="Be brief.") == "system: Be brief.\nuser: Hi\n<think>\n"
        tools = [{"type": "function", "function": {"name": "lamp", "parameters": {}}}]
        assert sent(tools=tools) == "user: Hi\nlamp\n<think>\n"
        assert not engine.generate("Hi", enable_thinking=False).thinking
        with pytest.raises(InputError) as raised:
            engine.generate("Hi", enable_thinking=False, template_options={"refuses": True})
        assert raised.value.code == "template_refused"
        assert "Disabling thinking is not supported." in str(raised.value)
        assert "enable_thinking=False" in str(raised.value)


@pytest.mark.parametrize(
    ("template", "fulfilled"),
    [
        ("{{ messages[0].content }}", {False}),
        ("{{ messages[0].content }}<think>\n", {True}),
        ("{{ messages[0].content }}<think>\n\n</think>\n\n", {False}),
    ],
)
def test_a_template_that_does_not_read_enable_thinking(tmp_path: Path, template: str, fulfilled: set[bool]) -> None:
    """A value that the template fulfills anyway is accepted; any other value would have no effect."""
    with flashmoe_mlx.load(checkpoint(tmp_path / "model", template)) as engine:
        for thinking in (False, True):
            options: dict[str, Any]
            for options in ({"enable_thinking": thinking}, {"template_options": {"enable_thinking": thinking}}):
                if thinking in fulfilled:
                    assert engine.encode("Hi", **options) == engine.encode("Hi")
                    continue
                with pytest.raises(InputError) as raised:
                    engine.encode("Hi", **options)
                assert raised.value.code == "unread_template_option"
                assert f"thinking={str(thinking).lower()} " in str(raised.value)


def test_options_that_a_template_does_not_read(thinking_model: Path) -> None:
    with flashmoe_mlx.load(thinking_model) as engine:
        assert engine.encode("Hi", template_options={"effort": "low"}) != engine.encode("Hi")
        with pytest.raises(InputError) as raised:
            engine.encode("Hi", template_options={"effort": "low", "reasoning_effort": "low"})
        assert raised.value.code == "unread_template_option"
        assert "template_options.reasoning_effort" in str(raised.value)
        assert "its options are effort, enable_thinking, refuses" in str(raised.value)


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "image"}, {"type": "input_audio"}, {}, 5]
)
def test_images_are_refused_whatever_the_template_writes_for_them(tmp_path: Path, part: Any) -> None:
    folder = checkpoint(tmp_path / "model", "{% for part in messages[-1].content %}<|image_pad|>{% endfor %}")
    text = {"type": "text", "text": "look"}
    with flashmoe_mlx.load(folder) as engine:
        assert engine.encode([{"role": "user", "content": [text]}])
        for parts in ([text, part], (text, part)):
            with pytest.raises(InputError) as raised:
                engine.encode([{"role": "user", "content": parts}])
            assert raised.value.code == "unsupported_content"
            assert str(raised.value).startswith("messages[0].content[1] is ")


TOOL = {"type": "function", "function": {"name": "lamp"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"raw": True, "system": "x"}, "system needs a chat template, and raw=true"),
        ({"raw": True, "tools": [TOOL]}, "tools needs a chat template"),
        ({"raw": True, "enable_thinking": False}, "enable_thinking or template_options needs a chat template"),
        ({"raw": True, "template_options": {"a": 1}}, "enable_thinking or template_options needs a chat template"),
        ({"system": 3}, "system is of type int"),
        ({"enable_thinking": "no"}, "enable_thinking='no'"),
        ({"enable_thinking": True, "template_options": {"enable_thinking": False}}, "contradict each other"),
        ({"template_options": {"enable_thinking": "false"}}, "enable_thinking='false': must be true"),
        ({"template_options": {"messages": []}}, "template_options.messages cannot be set"),
        ({"template_options": {"add_generation_prompt": False}}, "template_options.add_generation_prompt cannot"),
        ({"template_options": {"tools": []}}, "template_options.tools cannot be set: use tools="),
        ({"template_options": {"self": 1}}, "template_options.self cannot be set"),
        ({"template_options": {"a b": 1}}, "template_options: 'a b' is not the name"),
        ({"template_options": {3: 1}}, "template_options: 3 is not the name"),
        ({"template_options": [1]}, "template_options is of type list"),
        ({"template_options": {"a": object()}}, "which JSON does not have"),
        ({"tools": {}}, "tools must be a list"),
        ({"tools": "x"}, "tools must be a list"),
        ({"tools": ["x"]}, "tools[0] must be an object such as"),
        ({"tools": [TOOL, {"type": "web"}]}, "tools[1].type: 'web' is not supported"),
        ({"tools": [{"type": "function", "function": 3}]}, "tools[0].function must be an object"),
        ({"tools": [{"function": {}}]}, "tools[0].function.name must be text"),
        ({"tools": [{"name": ""}]}, "tools[0].name must be text"),
        ({"tools": [{"name": "a", "description": 3}]}, "tools[0].description must be text"),
        ({"tools": [{"name": "a", "parameters": ""}]}, "tools[0].parameters must be a JSON schema"),
        ({"tools": [{"name": "a", "parameters": [1]}]}, "tools[0].parameters must be a JSON schema"),
        ({"tools": [TOOL, TOOL]}, "tools[1]: a second function named 'lamp'"),
    ],
)
@pytest.mark.sampled(12)
def test_requests_of_a_template_are_checked(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        engine.encode(PROMPT, **options)
    assert message in str(raised.value)


@pytest.mark.parametrize("prompt", [3, None, b"bytes", {"role": "user"}])
def test_prompts_of_other_types(engine: Engine, prompt: Any) -> None:
    with pytest.raises(InputError) as raised:
        engine.encode(prompt)
    assert raised.value.code == "invalid_prompt"


def test_a_second_system_message(engine: Engine) -> None:
    with pytest.raises(InputError) as raised:
        engine.encode([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], system="c")
    assert raised.value.code == "invalid_system"


def test_a_missing_template_is_reported(tmp_path: Path, engine: Engine) -> None:
    assert "chat template" not in (engine.setup["note"] or "")
    with flashmoe_mlx.load(checkpoint(tmp_path / "model")) as bare:
        assert "this model has no chat template" in bare.setup["note"]
        assert bare.encode("Hi") == list(b"Hi")
        for options in ({"system": "x"}, {"enable_thinking": False}, {"tools": [TOOL]}):
            with pytest.raises(InputError) as raised:
                bare.encode("Hi", **options)  # type: ignore[arg-type]
            assert raised.value.code == "no_chat_template"
        with pytest.raises(InputError) as raised:
            bare.encode([{"role": "user", "content": "Hi"}])
        assert raised.value.code == "no_chat_template"


# Sampling as the model publishes it


def test_published_sampling_is_the_default(tmp_path: Path) -> None:
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 0.95}
    with flashmoe_mlx.load(checkpoint(tmp_path / "model", settings=settings)) as engine:

        def spoken(**options: Any) -> list[int]:
            return tokens_of(engine.generate("hello", max_tokens=12, ignore_eos=True, **options))

        assert len({tuple(spoken(seed=seed)) for seed in range(4)}) > 1
        assert spoken(seed=1) == spoken(seed=1)
        sampling = engine.stats()["sampling"]
        assert sampling["description"] == "temperature 1.0, top_k 20, top_p 0.95 (model's own)"
        assert spoken(temperature=0) == spoken(temperature=0)
        assert engine.stats()["sampling"]["description"] == "greedy"
        assert spoken(temperature=0) == spoken(top_k=1)


# Caches that grow


@pytest.mark.parametrize("kernels", ["auto", "mlx"])
@pytest.mark.sampled(1)
def test_caches_grow_across_their_borders(tmp_path: Path, kernels: str) -> None:
    """Decoding over 256 and 512 tokens, and chunks that span the borders, equal one pass; both kinds of caches."""
    folder = synthetic_pack("tiny", replace(TINY, max_context=1024), tmp_path).folder
    tokens = np.random.default_rng(0).integers(0, 256, 516).tolist()
    with flashmoe_mlx.load(folder, kernels=kernels) as engine:
        assert set(engine.model.config.full_attention) == {True, False}
        whole = engine.logits(tokens)
        cache = engine.new_cache()
        rows = [engine.forward(tokens[:250], cache)]
        rows += [engine.forward([token], cache) for token in tokens[250:259]]
        rows.append(engine.forward(tokens[259:508], cache))
        rows += [engine.forward([token], cache) for token in tokens[508:]]
        capacities = {layer.keys.shape[2] for layer in cache.layers if getattr(layer, "keys", None) is not None}
        assert capacities == {768}
        np.testing.assert_allclose(np.concatenate(rows), whole, rtol=0, atol=2e-4)
        np.testing.assert_allclose(engine.logits(tokens, prefill_chunk=100), whole, rtol=0, atol=2e-4)
