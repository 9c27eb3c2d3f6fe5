"""Answers for programs: JSON that satisfies a schema, and tool calls with their results."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from documents import Document
from questions import HIDING_PLACES, ITEMS, THINGS, article
from world import COLOURS, FOODS, INSTRUMENTS, MONTHS, PETS, PRODUCTS, TRADES, VILLAGES, VISITORS

Schema = dict[str, Any]
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_STRING, _INTEGER, _BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Slot:
    """A property of an object: its possible names, its schema, a generator of values, and sentences about ``n``."""

    names: tuple[str, ...]
    schema: Schema
    value: Callable[[Random], Any]
    sentences: Callable[[Any, str], tuple[str, ...]]


def _choice(values: tuple[str, ...]) -> Callable[[Random], str]:
    return lambda draw: draw.choice(values)


def _several(values: tuple[str, ...]) -> Callable[[Random], list[str]]:
    return lambda draw: draw.sample(values, draw.randint(1, 3))


def _listed(words: list[str]) -> str:
    return " and ".join(([", ".join(words[:-1])] if words[:-1] else []) + words[-1:])


_LIST = {"type": "array", "items": {"type": "string"}}
SLOTS = (
    Slot(
        ("age", "years"),
        _INTEGER,
        lambda d: d.randint(5, 98),
        lambda v, n: (f"{n} is {v} years old.", f"The age of {n} is {v}."),
    ),
    Slot(
        ("village", "home", "lives_in"),
        _STRING,
        _choice(VILLAGES),
        lambda v, n: (f"{n} lives in {v}.", f"The home of {n} is in {v}."),
    ),
    Slot(
        ("trade", "work", "job"),
        _STRING,
        _choice(TRADES),
        lambda v, n: (f"{n} works as {article(v)}.", f"{n} is {article(v)} by trade."),
    ),
    Slot(
        ("pet", "animal"),
        {"type": "string", "enum": list(PETS[:6])},
        _choice(PETS[:6]),
        lambda v, n: (f"{n} has {article(v)}.", f"{n} keeps {article(v)}."),
    ),
    Slot(
        ("pet", "animal"), _STRING, _choice(PETS), lambda v, n: (f"{n} has {article(v)}.", f"{n} keeps {article(v)}.")
    ),
    Slot(
        ("food", "favourite_food", "eats"),
        _STRING,
        _choice(FOODS),
        lambda v, n: (f"{n} likes {v}.", f"The favourite food of {n} is {v}."),
    ),
    Slot(
        ("instrument", "plays"),
        _STRING,
        _choice(INSTRUMENTS),
        lambda v, n: (f"{n} plays the {v}.", f"{n} makes music on the {v}."),
    ),
    Slot(
        ("hat_colour", "hat"),
        {"type": "string", "enum": ["red", "blue", "green", "white"]},
        _choice(("red", "blue", "green", "white")),
        lambda v, n: (f"The hat of {n} is {v}.", f"{n} wears a {v} hat."),
    ),
    Slot(
        ("house_colour", "house"),
        _STRING,
        _choice(COLOURS),
        lambda v, n: (f"The house of {n} is {v}.", f"{n}'s house is painted {v}."),
    ),
    Slot(
        ("birth_month", "born_in"),
        _STRING,
        _choice(MONTHS),
        lambda v, n: (f"{n} was born in {v}.", f"The birthday of {n} is in {v}."),
    ),
    Slot(
        ("has_boat", "boat"),
        _BOOLEAN,
        lambda d: d.random() < 0.5,
        lambda v, n: (
            (f"{n} has a boat.", f"{n} owns a boat.") if v else (f"{n} has no boat.", f"{n} does not own a boat.")
        ),
    ),
    Slot(
        ("married", "is_married"),
        _BOOLEAN,
        lambda d: d.random() < 0.5,
        lambda v, n: (f"{n} is married.",) if v else (f"{n} is not married.",),
    ),
    Slot(
        ("can_swim", "swims"),
        _BOOLEAN,
        lambda d: d.random() < 0.5,
        lambda v, n: (f"{n} can swim.",) if v else (f"{n} cannot swim.",),
    ),
    Slot(
        ("coins", "money"),
        _INTEGER,
        lambda d: d.randint(2, 99),
        lambda v, n: (f"{n} has {v} coins.", f"There are {v} coins in {n}'s bag."),
    ),
    Slot(
        ("children", "number_of_children"),
        _INTEGER,
        lambda d: d.randint(2, 9),
        lambda v, n: (f"{n} has {v} children.",),
    ),
    Slot(("sells", "goods"), _LIST, _several(PRODUCTS), lambda v, n: (f"{n} sells {_listed(v)}.",)),
    Slot(
        ("friends", "friend_names"),
        _LIST,
        _several(VISITORS[:28]),
        lambda v, n: (f"The friends of {n} are {_listed(v)}.", f"{n} is a friend of {_listed(v)}."),
    ),
    Slot(("visited", "has_seen"), _LIST, _several(VILLAGES), lambda v, n: (f"{n} has visited {_listed(v)}.",)),
    Slot(
        ("market_day", "day"),
        {"type": "string", "enum": list(DAYS)},
        _choice(DAYS),
        lambda v, n: (f"{n} goes to market on {v}.",),
    ),
)
_ASKED = (
    "Answer with JSON that follows this schema: {}",
    "Write JSON after this schema: {}",
    "Give me JSON for this schema: {}",
    "Fill this JSON schema: {}",
    "Use this schema and answer with JSON only: {}",
)


def json_request(draw: Random) -> Document:
    """Return a chat with facts about a person, and a schema that the answer must satisfy."""
    document = Document("json")
    name = draw.choice(VISITORS[28:])
    chosen = draw.sample(SLOTS, draw.randint(1, 5))
    extra = draw.sample(SLOTS, draw.choice((0, 0, 1, 2)))
    properties: Schema = {}
    answer: dict[str, Any] = {}
    name_key = draw.choice(("name", "person", "who"))
    if draw.random() < 0.85:
        properties[name_key], answer[name_key] = _STRING, name
    sentences, used = [], {name_key}
    for index, slot in enumerate([*chosen, *extra]):
        key = draw.choice(slot.names)
        if used & set(slot.names):
            continue
        used |= set(slot.names)
        value = slot.value(draw)
        sentences.append(draw.choice(slot.sentences(value, name)))
        if index < len(chosen):
            properties[key], answer[key] = slot.schema, value
    if draw.random() < 0.15 and len(properties) > 2:  # one level of nesting
        keys = list(properties)[-2:]
        outer = draw.choice(("details", "facts", "about"))
        inner = {key: properties.pop(key) for key in keys}
        properties[outer] = {"type": "object", "properties": inner, "required": keys}
        answer[outer] = {key: answer.pop(key) for key in keys}
    draw.shuffle(sentences)
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    facts = document.say(*sentences)
    asked = draw.choice(_ASKED).format(json.dumps(schema))
    text = json.dumps(answer)
    document.say(text)
    style = draw.random()
    if style < 0.2:
        document.messages += [{"role": "system", "content": asked}, {"role": "user", "content": facts}]
    else:
        content = f"{asked}\n{facts}" if style < 0.7 else f"{facts}\n{asked}"
        document.messages.append({"role": "user", "content": content})
    document.messages.append({"role": "assistant", "content": text})
    document.expected = {"schema": schema, "json": answer}
    return document


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call: names of the function and its parameters, requests, and results.

    ``ask`` and ``tell`` are templates with the values by position; ``result`` draws a result of the tool.
    """

    names: tuple[str, ...]
    description: str
    parameters: tuple[tuple[tuple[str, ...], Schema, Callable[[Random], Any]], ...]
    ask: tuple[str, ...]
    result: Callable[[Random, list[Any]], dict[str, Any]]
    tell: str


def _number(least: int, most: int) -> Callable[[Random], int]:
    return lambda draw: draw.randint(least, most)


_VILLAGE = (("village", "place", "where"), _STRING, _choice(VILLAGES))
_DAY = (("day", "weekday", "when"), _STRING, _choice(DAYS))
_PERSON = (("name", "person", "who"), _STRING, _choice(VISITORS))
_ITEM = (("item", "thing", "object"), _STRING, _choice(ITEMS))
_GOODS = (("goods", "product", "item"), _STRING, _choice(PRODUCTS))


def _count_of(most: int) -> tuple[tuple[str, ...], Schema, Callable[[Random], Any]]:
    return ("count", "number", "amount"), _INTEGER, _number(2, most)


TOOLS = (
    Tool(
        ("get_weather", "weather", "check_weather"),
        "The weather in a village",
        (_VILLAGE, _DAY),
        ("What is the weather in {0} on {1}?", "Will it rain in {0} on {1}?", "How warm is {0} on {1}?"),
        lambda d, v: {"sky": d.choice(("rain", "sun", "snow", "fog", "wind")), "degrees": d.randint(2, 35)},
        "In {0} there will be {sky} on {1}, with {degrees} degrees.",
    ),
    Tool(
        ("find_person", "where_is", "locate"),
        "Find out where somebody is",
        (_PERSON,),
        ("Where is {0} now?", "Please find {0}.", "Can you look for {0}?"),
        lambda d, v: {"village": d.choice(VILLAGES), "place": d.choice(HIDING_PLACES)},
        "{0} is in the {place} in {village}.",
    ),
    Tool(
        ("add", "add_numbers", "sum"),
        "Add two numbers",
        ((("a", "x", "first"), _INTEGER, _number(100, 999)), (("b", "y", "second"), _INTEGER, _number(100, 999))),
        ("What is {0} plus {1}?", "Add {0} and {1}.", "What do {0} and {1} make?"),
        lambda d, v: {"result": v[0] + v[1]},
        "{0} plus {1} is {result}.",
    ),
    Tool(
        ("get_price", "price", "ask_price"),
        "What something costs in a village",
        (_GOODS, _VILLAGE),
        ("What does {0} cost in {1}?", "How much is {0} in {1}?", "Tell me the price of {0} in {1}."),
        lambda d, v: {"coins": d.randint(2, 90)},
        "In {1} you pay {coins} coins for {0}.",
    ),
    Tool(
        ("buy", "order", "buy_goods"),
        "Buy goods on the market",
        (_GOODS, _count_of(60)),
        ("Buy {1} pieces of {0}.", "Please order {0}, {1} pieces.", "I need {1} pieces of {0}."),
        lambda d, v: {"paid": d.randint(2, 300)},
        "I bought {1} pieces of {0} for {paid} coins.",
    ),
    Tool(
        ("send_letter", "write_to", "send_message"),
        "Send a letter to somebody",
        (_PERSON, _VILLAGE),
        ("Send a letter to {0} in {1}.", "Write to {0} in {1}.", "Please send word to {0}, who lives in {1}."),
        lambda d, v: {"arrives": d.choice(DAYS)},
        "The letter to {0} arrives in {1} on {arrives}.",
    ),
    Tool(
        ("set_lamp", "lamp", "switch_lamp"),
        "Switch the lamp of a room on or off",
        ((("room", "place"), _STRING, _choice(HIDING_PLACES)), (("on", "state"), _BOOLEAN, lambda d: d.random() < 0.5)),
        (
            "Switch the lamp in the {0} {1:onoff}.",
            "Turn {1:onoff} the lamp in the {0}.",
            "The lamp in the {0} should be {1:onoff}.",
        ),
        lambda d, v: {"done": True},
        "The lamp in the {0} is {1:onoff} now.",
    ),
    Tool(
        ("book_boat", "reserve_boat", "boat"),
        "Book seats on a boat",
        (
            (("from", "start"), _STRING, _choice(VILLAGES[:6])),
            (("to", "end"), _STRING, _choice(VILLAGES[6:])),
            (("seats", "people"), _INTEGER, _number(2, 12)),
        ),
        (
            "Book {2} seats on the boat from {0} to {1}.",
            "We are {2} people and go from {0} to {1} by boat.",
            "I want {2} seats from {0} to {1}.",
        ),
        lambda d, v: {"leaves": d.choice(DAYS), "coins": d.randint(3, 60)},
        "The boat from {0} to {1} leaves on {leaves}; {2} seats cost {coins} coins.",
    ),
    Tool(
        ("play_song", "play", "make_music"),
        "Let somebody play an instrument",
        (_PERSON, (("instrument", "on"), _STRING, _choice(INSTRUMENTS))),
        ("Let {0} play the {1}.", "I want to hear {0} on the {1}.", "Please ask {0} to play the {1}."),
        lambda d, v: {"minutes": d.randint(2, 20)},
        "{0} plays the {1} for {minutes} minutes.",
    ),
    Tool(
        ("count_things", "count", "how_many"),
        "Count things in a place",
        ((("things", "what"), _STRING, _choice(THINGS)), (("place", "room"), _STRING, _choice(HIDING_PLACES))),
        ("How many {0} are in the {1}?", "Count the {0} in the {1}.", "Please count all {0} in the {1}."),
        lambda d, v: {"count": d.randint(2, 99)},
        "There are {count} {0} in the {1}.",
    ),
    Tool(
        ("lend", "lend_item", "give"),
        "Lend something to somebody for some days",
        (_ITEM, _PERSON, (("days", "for_days"), _INTEGER, _number(2, 30))),
        ("Lend the {0} to {1} for {2} days.", "{1} needs the {0} for {2} days.", "Give {1} the {0} for {2} days."),
        lambda d, v: {"back_on": d.choice(DAYS)},
        "{1} has the {0} for {2} days and brings it back on {back_on}.",
    ),
    Tool(
        ("cook", "cook_meal", "make_food"),
        "Cook a meal for some guests",
        ((("food", "meal", "dish"), _STRING, _choice(FOODS)), (("guests", "people"), _INTEGER, _number(2, 40))),
        ("Cook {0} for {1} guests.", "Please make {0} for {1} people.", "{1} guests want {0}."),
        lambda d, v: {"minutes": d.randint(10, 90)},
        "The {0} for {1} guests is ready in {minutes} minutes.",
    ),
    Tool(
        ("hire", "hire_worker", "call_worker"),
        "Hire somebody of a trade",
        ((("trade", "job"), _STRING, _choice(TRADES)), _DAY),
        ("I need a {0} on {1}.", "Hire a {0} for {1}.", "Please call the {0} on {1}."),
        lambda d, v: {"name": d.choice(VISITORS)},
        "On {1} {name} will come as your {0}.",
    ),
    Tool(
        ("paint", "paint_it", "set_colour"),
        "Paint something in a colour",
        (_ITEM, (("colour", "paint"), _STRING, _choice(COLOURS))),
        ("Paint the {0} {1}.", "The {0} should be {1}.", "I want the {0} in {1}."),
        lambda d, v: {"done": True},
        "The {0} is {1} now.",
    ),
)


class _OnOff(int):
    """A boolean that templates can write as words."""

    def __format__(self, spec: str) -> str:
        return ("on" if self else "off") if spec == "onoff" else str(bool(self))


def _spelled(values: list[Any]) -> list[Any]:
    return [_OnOff(value) if isinstance(value, bool) else value for value in values]


def _declared(tool: Tool, draw: Random) -> tuple[str, list[str], dict[str, Any]]:
    """Return a name for the tool, names of its parameters, and its declaration."""
    name, keys = draw.choice(tool.names), []
    for names, _, _ in tool.parameters:
        keys.append(draw.choice([key for key in names if key not in keys]))
    properties = {key: schema for key, (_, schema, _) in zip(keys, tool.parameters, strict=True)}
    parameters = {"type": "object", "properties": properties, "required": keys}
    function = {"name": name, "description": tool.description, "parameters": parameters}
    return name, keys, {"type": "function", "function": function}


def tool_use(draw: Random) -> Document:
    """Return a chat with tools, a request and the call, or with a call, its result and a sentence about the result."""
    document = Document("tool_call")
    chosen, *others = draw.sample(TOOLS, draw.choice((1, 2, 2, 3)))
    name, keys, declaration = _declared(chosen, draw)
    declarations = [declaration]
    for other in others:
        other_name, _, other_declaration = _declared(other, draw)
        if other_name != name:
            declarations.append(other_declaration)
    draw.shuffle(declarations)
    document.tools = declarations
    if draw.random() < 0.1:
        document.messages.append(
            {"role": "system", "content": draw.choice(("Be brief.", "Help the people of the valley."))}
        )
    values = [value(draw) for _, _, value in chosen.parameters]
    request = draw.choice(chosen.ask).format(*_spelled(values))
    arguments = dict(zip(keys, values, strict=True))
    call = {"name": name, "arguments": arguments}
    document.say(request, json.dumps(call))
    document.messages += [
        {"role": "user", "content": request},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    document.expected = {"call": call}
    if draw.random() < 0.4:
        document.kind = "tool_result"
        result = chosen.result(draw, values)
        answer = chosen.tell.format(*_spelled(values), **result)
        document.say(answer)
        document.messages += [
            {"role": "tool", "content": json.dumps(result)},
            {"role": "assistant", "content": answer},
        ]
        document.expected = {"exact": answer}
    return document
