"""Well-known clients against a live server, each as its users call it; they need the extra ``clients``."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Live

from flashmoe_mlx.engine import load

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]  # warnings of the clients are their own

BUY = {
    "name": "buy",
    "description": "Buy goods on the market",
    "parameters": {
        "type": "object",
        "properties": {"product": {"type": "string"}, "amount": {"type": "integer"}},
        "required": ["product", "amount"],
        "additionalProperties": False,
    },
}
ASK = "Please order cider, 6 pieces."
BOUGHT = "I bought 6 pieces of cider for 12 coins."
SUM, ANSWER = "What is 17 plus 25?", "17 plus 25 is 42."
PERSON = "Mabel has no boat. There are 6 coins in Mabel's bag. Write JSON."
GREEDY = {"temperature": 0}
AGENTS = Path(__file__).parents[1] / "tools" / "agents"


def documented(live: Live, section: str, kind: str) -> str:
    """Return the lines of docs/serve.md for a client of ``live``."""
    spec = importlib.util.spec_from_file_location("documented", AGENTS / "documented.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.documented(section, kind, live.url, "demo"))


def person() -> Any:
    """Return a class for answers about a person."""
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        boat: bool
        coins: int

    return Person


class TestOpenAI:
    @pytest.fixture
    def client(self, live: Live) -> Any:
        openai = pytest.importorskip("openai")
        return openai.OpenAI(base_url=f"{live.url}/v1", api_key="x")

    def test_an_answer(self, client: Any) -> None:
        made = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": SUM}], **GREEDY)
        assert made.choices[0].message.content == ANSWER
        assert {model.id for model in client.models.list()} == {"demo", "other"}
        text = client.completions.create(model="demo", prompt="17 plus", max_tokens=3, **GREEDY).choices[0].text
        assert text

    def test_a_call_its_result_and_the_answer(self, client: Any) -> None:
        tools = [{"type": "function", "function": {**BUY, "strict": True}}]
        messages: list[Any] = [{"role": "user", "content": ASK}]
        with client.chat.completions.stream(model="demo", messages=messages, tools=tools, **GREEDY) as stream:
            kinds = {event.type for event in stream}
            message = stream.get_final_completion().choices[0].message
        assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
        (call,) = message.tool_calls
        assert call.function.parsed_arguments == {"product": "cider", "amount": 6}
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": '{"paid": 12}'}]
        done = client.chat.completions.create(model="demo", messages=messages, tools=tools, **GREEDY)
        assert done.choices[0].message.content == BOUGHT

    def test_parsed_answers(self, client: Any) -> None:
        messages = [{"role": "user", "content": PERSON}]
        made = client.chat.completions.parse(model="demo", messages=messages, response_format=person(), **GREEDY)
        assert isinstance(made.choices[0].message.parsed.coins, int)

    def test_responses(self, client: Any) -> None:
        with client.responses.stream(model="demo", input=SUM, **GREEDY) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            final = stream.get_final_response()
        assert (text, final.output_text, final.status) == (ANSWER, ANSWER, "completed")
        parsed = client.responses.parse(model="demo", input=PERSON, text_format=person(), **GREEDY)
        assert isinstance(parsed.output_parsed.boat, bool)
        tools = [{"type": "function", **BUY, "strict": True}]
        items: list[Any] = [{"role": "user", "content": ASK}]
        called = client.responses.create(model="demo", input=items, tools=tools, **GREEDY)
        (call,) = [item for item in called.output if item.type == "function_call"]
        items += [*called.output, {"type": "function_call_output", "call_id": call.call_id, "output": '{"paid": 12}'}]
        assert client.responses.create(model="demo", input=items, tools=tools, **GREEDY).output_text == BOUGHT

    def test_errors_have_their_classes(self, client: Any) -> None:
        import openai

        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "apple " * 9000}])
        assert (refused.value.code, refused.value.type) == ("context_length_exceeded", "invalid_request_error")
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="demo", messages=[], temperature=7)
        assert refused.value.param
        with pytest.raises(openai.APIStatusError) as refused:
            client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x" * (33 * 2**20)}])
        assert (refused.value.status_code, refused.value.code) == (413, "body_too_large")

    def test_retries(self, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
        """A full queue is answered so that the SDK asks again; a request that times out is taken over."""
        openai = pytest.importorskip("openai")
        monkeypatch.setattr("flashmoe_mlx.server.service.Service.submit", _fails_first(live.service.submit))
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=1)
        made = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": SUM}], **GREEDY)
        assert made.choices[0].message.content == ANSWER


def _fails_first(submit: Any) -> Any:
    from flashmoe_mlx.server.errors import ApiError

    calls: list[int] = []

    def wrapped(service: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ApiError("the queue is full", status=429, code="queue_full", retry_after=1)
        return submit(*arguments, **named)

    return wrapped


class TestAnthropic:
    TOOLS = [{"name": "buy", "description": BUY["description"], "input_schema": BUY["parameters"]}]

    @pytest.fixture
    def client(self, live: Live) -> Any:
        anthropic = pytest.importorskip("anthropic")
        return anthropic.Anthropic(base_url=live.url, api_key="x")

    def test_an_answer(self, client: Any) -> None:
        messages = [{"role": "user", "content": SUM}]
        with client.messages.stream(model="demo", max_tokens=50, messages=messages, extra_body=GREEDY) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert (text, final.content[0].text, final.stop_reason) == (ANSWER, ANSWER, "end_turn")
        whole = client.messages.create(model="demo", max_tokens=50, messages=messages, extra_body=GREEDY)
        assert whole.content[0].text == ANSWER
        counted = client.messages.count_tokens(model="demo", messages=messages)
        assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
        assert [model.id for model in client.models.list()] == ["demo", "other"]

    def test_a_call_its_result_and_the_answer(self, client: Any) -> None:
        messages: list[Any] = [{"role": "user", "content": ASK}]
        fields = {"model": "demo", "max_tokens": 100, "tools": self.TOOLS, "extra_body": GREEDY}
        with client.messages.stream(messages=messages, **fields) as stream:
            message = stream.get_final_message()
        assert message.stop_reason == "tool_use"
        (call,) = [block for block in message.content if block.type == "tool_use"]
        assert call.input == {"product": "cider", "amount": 6}
        result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"paid": 12}'}
        messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        assert client.messages.create(messages=messages, **fields).content[0].text == BOUGHT

    def test_thinking_comes_back(self, client: Any) -> None:
        messages: list[Any] = [{"role": "user", "content": SUM}]
        fields = {"model": "demo", "max_tokens": 2000, "thinking": {"type": "enabled", "budget_tokens": 1024}}
        message = client.messages.create(messages=messages, **fields)
        assert message.content[0].type == "thinking"
        messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": SUM}]
        assert client.messages.create(messages=messages, **fields).content

    def test_parsed_answers(self, client: Any) -> None:
        messages = [{"role": "user", "content": PERSON}]
        made = client.messages.parse(
            model="demo", max_tokens=200, messages=messages, output_format=person(), extra_body=GREEDY
        )
        assert isinstance(made.parsed_output.coins, int)

    def test_errors_have_their_classes(self, client: Any) -> None:
        import anthropic

        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 4096 maximum"):
            client.messages.create(model="demo", max_tokens=1, messages=[{"role": "user", "content": "apple " * 9000}])
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.create(model="demo", max_tokens=-1, messages=[{"role": "user", "content": SUM}])
        assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(("section", "package"), [("OpenAI SDK", "openai"), ("Anthropic SDK", "anthropic")])
def test_documented_lines_of_sdks(live: Live, section: str, package: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(package)
    exec(compile(documented(live, section, "python"), "docs/serve.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_llm(live: Live, tmp_path: Path) -> None:
    """The models are those of docs/serve.md."""
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(documented(live, "llm", "yaml"))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}

    def ask(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", "prompt", "-m", "local", "-o", "temperature", "0", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert ask(SUM) == ANSWER
    assert set(json.loads(ask(PERSON, "--schema", "name str, boat bool, coins int"))) == {"name", "boat", "coins"}
    function = (
        'def buy(product: str, amount: int) -> str:\n    "Buy goods on the market"\n    return \'{"paid": 12}\'\n'
    )
    assert BOUGHT in ask(ASK, "--functions", function)


class TestPydanticAI:
    @pytest.fixture
    def model(self, live: Live) -> Any:
        pytest.importorskip("pydantic_ai")
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        return OpenAIChatModel("demo", provider=OpenAIProvider(base_url=f"{live.url}/v1", api_key="x"))

    def test_tool_output(self, model: Any) -> None:
        """The type of the answer is a tool that the model must call."""
        from pydantic_ai import Agent

        answer = Agent(model, output_type=person(), model_settings=GREEDY).run_sync(PERSON)
        assert isinstance(answer.output.coins, int)

    def test_native_output(self, model: Any) -> None:
        from pydantic_ai import Agent, NativeOutput

        answer = Agent(model, output_type=NativeOutput(person()), model_settings=GREEDY).run_sync(PERSON)
        assert isinstance(answer.output.boat, bool)

    def test_a_tool(self, model: Any) -> None:
        from pydantic_ai import Agent

        agent = Agent(model, model_settings=GREEDY)
        bought = []

        def buy(product: str, amount: int) -> dict[str, int]:
            """Buy goods on the market."""
            bought.append((product, amount))
            return {"paid": 12}

        agent.tool_plain(buy)
        assert agent.run_sync(ASK).output == BOUGHT
        assert bought == [("cider", 6)]


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(live: Live, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    from openai import OpenAI

    client = instructor.from_openai(OpenAI(base_url=f"{live.url}/v1", api_key="x"), mode=instructor.Mode[mode])
    messages = [{"role": "user", "content": PERSON}]
    made = client.chat.completions.create(
        model="demo", messages=messages, response_model=person(), max_retries=0, **GREEDY
    )
    assert isinstance(made.coins, int)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic"])
def test_litellm(live: Live, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    base = live.url if provider == "anthropic" else f"{live.url}/v1"
    fields = {"model": f"{provider}/demo", "api_base": base, "api_key": "x", **GREEDY}
    messages: list[Any] = [{"role": "user", "content": SUM}]
    assert litellm.completion(messages=messages, **fields).choices[0].message.content == ANSWER
    parts = [
        chunk.choices[0].delta.content or "" for chunk in litellm.completion(messages=messages, stream=True, **fields)
    ]
    assert "".join(parts) == ANSWER
    messages = [{"role": "user", "content": ASK}]
    tools = [{"type": "function", "function": BUY}]
    message = litellm.completion(messages=messages, tools=tools, **fields).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"product": "cider", "amount": 6}
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": '{"paid": 12}'}]
    assert litellm.completion(messages=messages, tools=tools, **fields).choices[0].message.content == BOUGHT


@pytest.mark.parametrize(
    ("form", "model"), [("openai-chat", "gpt-5"), ("anthropic", "claude-sonnet-4"), ("open-responses", "gpt-5")]
)
def test_llm_comply(live: Live, form: str, model: str) -> None:
    """All checks of the APIs' published descriptions, but those of images; the names let it check thinking, too."""
    pytest.importorskip("llm_comply")
    program = str(Path(sys.executable).with_name("llm-comply"))
    command = [program, "run", "-u", f"{live.url}/v1", "-k", "x", "-m", model, "--format", form, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    results = json.loads(done.stdout)["results"]
    assert len(results) >= 9
    assert [result for result in results if result["status"] != "passed" and "image" not in result["id"]] == []


LM_EVAL_TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
LM_EVAL_QUESTIONS = [
    {"question": "17 plus 25 is", "choices": ["42.", "41.", "a village on a river."], "right": 0},
    {"question": "The village of Larkrise lies", "choices": ["12", "by the sea.", "🙂 naïve"], "right": 0},
]


@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_lm_eval(live: Live, demo_pack: Path, tmp_path: Path, backend: str) -> None:
    """The log-likelihoods of the documented command equal those of the logits; lm-eval may be anywhere on PATH."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("lm_eval", path=places)
    if program is None:
        pytest.skip("lm-eval is not installed: pip install 'lm-eval[api]' transformers, here or on PATH")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in LM_EVAL_QUESTIONS))
    (tmp_path / "sums.yaml").write_text(LM_EVAL_TASK.replace("QUESTIONS", str(questions)))
    words = shlex.split(documented(live, "lm-eval", "sh").replace("\\\n", " "))
    found = {"TASK": "sums", "lm_eval": program}
    command = [found.get(word, word).replace("=my-pack", f"={demo_pack}") for word in words]
    if backend == "remote":
        command = [re.sub("=huggingface,tokenizer=[^,]+", "=remote", word) for word in command]
    command += ["--include_path", str(tmp_path), "--log_samples", "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("samples_sums_*.jsonl")
    scored = {
        (arguments["arg_0"], arguments["arg_1"]): response
        for sample in map(json.loads, samples.read_text().splitlines())
        for arguments, response in zip(sample["arguments"].values(), sample["filtered_resps"], strict=True)
    }
    assert len(scored) == 6
    with load(demo_pack) as engine:
        for (context, continuation), (likelihood, greedy) in scored.items():
            whole = engine.tokenizer.encode(context + continuation)
            first = len(engine.tokenizer.encode(context))
            logits = engine.logits(whole).astype(np.float64)[first - 1 : -1]
            logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
            expected = sum(logprobs[row, token] for row, token in enumerate(whole[first:]))
            assert float(likelihood) == pytest.approx(expected, abs=1e-4)
            assert (greedy == "True") == (logits.argmax(-1).tolist() == whole[first:])
