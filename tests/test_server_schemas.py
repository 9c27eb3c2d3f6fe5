"""JSON schemas through the server with the demo model at 2 bits: every answer satisfies its schema."""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
from serving import Live, serve

from flashmoe_mlx.made_models.demo import demo_with_variants
from flashmoe_mlx.stores.registry import backend_settings

_SUBJECTS = ["Mabel has no boat and 6 coins.", "The village of Larkrise lies on a river.", "17 plus 25 is 42."]


@pytest.fixture(scope="module")
def two_bits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Serve the demo model with experts of 2 bits."""
    folder = demo_with_variants({"q2-minmax"}, tmp_path_factory.mktemp("demo"))
    backend = {**backend_settings("pread"), "variant": "q2-minmax"}
    with serve(folder, engine_options={"backend": backend}) as running:
        yield running


def schema_of(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    """Return a schema of a small document."""
    kinds = ["text", "choice", "number", "flag", "pattern", *(["list", "object", "either"] if depth else [])]
    match draw.choice(kinds):
        case "text":
            return {"type": "string", "maxLength": draw.randint(1, 20)}
        case "choice":
            return {"enum": draw.sample(["yes", "no", "some day", 7, None, True, "é"], draw.randint(1, 5))}
        case "number":
            low = draw.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 100)}
        case "flag":
            return {"type": ["boolean", "null"]}
        case "pattern":
            return {"type": "string", "pattern": draw.choice(["^[A-Z][a-z]{1,8}$", r"^\d{4}-\d{2}$", "^(a|bb){1,3}$"])}
        case "list":
            most = draw.randint(1, 3)
            least = draw.randint(0, most)
            return {"type": "array", "items": schema_of(draw, depth - 1), "minItems": least, "maxItems": most}
        case "either":
            return {"anyOf": [schema_of(draw, depth - 1), {"type": "null"}]}
        case _:
            return object_of(draw, depth - 1)


def object_of(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    """Return a schema of an object with up to four properties."""
    names = draw.sample(["name", "coins", "has boat", "Größe", "a.b", 'q"'], draw.randint(1, 4))
    properties = {name: schema_of(draw, depth) for name in names}
    required = [name for name in names if draw.random() < 0.8]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def unsatisfied(live: Live, seed: int) -> str | None:
    """Ask for a document of a random schema; return a description of the failure, if any."""
    draw = random.Random(seed)
    schema = object_of(draw)
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": f"{draw.choice(_SUBJECTS)} Write JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        "temperature": draw.choice([0, 1]),
        "seed": seed,
        "max_tokens": 1500,
    }
    (choice,) = live.post(**body)["choices"]
    text = choice["message"]["content"]
    if choice["finish_reason"] != "stop":
        return f"seed {seed}: {choice['finish_reason']}: {text[-200:]!r}"
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"seed {seed}: {error}"
    return None


@pytest.mark.parametrize("count", [3, pytest.param(100, marks=pytest.mark.nightly)])
def test_every_answer_satisfies_its_schema(two_bits: Live, count: int) -> None:
    first = random.randrange(2**20)
    with ThreadPoolExecutor(8) as pool:
        failures = [found for found in pool.map(lambda n: unsatisfied(two_bits, first + n), range(count)) if found]
    assert failures == []
