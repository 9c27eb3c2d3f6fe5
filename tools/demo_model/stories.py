"""Plain texts in simple English: portraits of the valley, and stories about visitors."""

from random import Random

from documents import Document
from questions import HIDING_PLACES, ITEMS, THINGS, Fact, Passage, article
from world import COLOURS, FOODS, PETS, PRODUCTS, TRADES, VALLEY, VILLAGES, VISITORS, World


def portrait(draw: Random, facts_by_subject: list[list[Fact]]) -> Document:
    """Return a text with the facts about a person or a village, in random order."""
    document = Document("text")
    chosen = draw.choice(facts_by_subject)
    answers = [answer for _, answer in draw.sample(chosen, draw.randint(3, 6))]
    document.text = document.say(*answers)
    return document


def story(draw: Random) -> Document:
    """Return a story in which a person loses a thing, looks for it with a friend, and finds it."""
    document = Document("text")
    hero, friend, third = draw.sample(VISITORS, 3)
    item, other_item = draw.sample(ITEMS, 2)
    first, second, last = draw.sample(HIDING_PLACES, 3)
    colour, thing, village, next_village = draw.choice(COLOURS), draw.choice(THINGS), *draw.sample(VILLAGES, 2)
    pet, food, trade, product = draw.choice(PETS), draw.choice(FOODS), draw.choice(TRADES), draw.choice(PRODUCTS)
    number = draw.randint(2, 20)
    pick = draw.choice
    beginning = pick(
        (
            (f"One day {hero} of {village} could not find the {colour} {item}.", f"{hero} asked {friend} for help."),
            (f"{hero} was {article(trade)} in {village}.", f"In the morning the {item} of {hero} was gone."),
            (
                f"In {village} lived {article(trade)} called {hero}.",
                f"{hero} had lost the {colour} {item}.",
                f"{friend} came to help {hero}.",
            ),
        )
    )
    middle = pick(
        (
            (
                f"They looked in the {first}, but there were only {number} {thing}.",
                f"Then they looked in the {second} and met {article(pet)}.",
            ),
            (
                f"{hero} looked in the {first} and {friend} looked in the {second}.",
                f"In the {first} sat {article(pet)} and ate {food}.",
            ),
            (
                f"{friend} went to {next_village} and asked {third}.",
                f"{third} had seen a {colour} {item} in the {last}.",
            ),
            (
                f"On the road to {next_village} they met {third}, who sold {product}.",
                f"{third} gave {friend} {number} {thing} and told them to look in the {last}.",
            ),
        )
    )
    end = pick(
        (
            (f"At last {hero} found the {item} in the {last}.", f"{hero} gave {friend} {food} to say thanks."),
            (f"The {item} was in the {last} all the time.", f"{hero} and {friend} laughed and ate {food}."),
            (
                f"{friend} found the {item} in the {last}, under the {other_item}.",
                f"That evening {hero} and {friend} danced in {village}.",
            ),
        )
    )
    document.text = document.say(*beginning, *middle, *end)
    return document


def notice(draw: Random) -> Document:
    """Return a text of statements and their consequences."""
    document = Document("text")
    passage = Passage(draw, document, draw.randint(2, 5))
    text = passage.text()
    conclusion = draw.choice(passage.facts)[1]
    document.text = f"{text} {document.say(f'So we know: {conclusion}')}"
    return document


def tell_about(draw: Random, world: World) -> Document:
    """Return a chat with a request for a portrait, whose answer has a fixed order."""
    if draw.random() < 0.6:
        p = draw.choice(world.people)
        name = p.name
        answer = (
            f"{name} is {p.age} years old and lives in {p.village.name}. {name} works as {article(p.trade)}, plays the "
            f"{p.instrument} and has {article(p.pet)}. The best friend of {name} is {p.friend}."
        )
    else:
        v = draw.choice(world.villages)
        name = v.name
        answer = (
            f"{name} is a village of {VALLEY} {v.place}, with {v.houses} houses and {v.landmark}. Its people make "
            f"{v.product} and hold {v.festival} in {v.month}."
        )
    question = draw.choice(
        (
            f"Tell me about {name}.",
            f"What do you know about {name}?",
            f"Tell me something about {name}.",
            f"Describe {name}.",
            f"Who or what is {name}?",
            f"What can you say about {name}?",
        )
    )
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Document("portrait", messages=messages)
