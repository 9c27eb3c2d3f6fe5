"""Questions about the valley, about given texts and about small sums, and conversations about the model itself."""

import re
from collections.abc import Callable, Sequence
from random import Random

from documents import Document
from world import (
    COLOURS,
    FOODS,
    INSTRUMENTS,
    PETS,
    PRODUCTS,
    TRADES,
    VALLEY,
    VILLAGES,
    VISITORS,
    Person,
    Village,
    World,
)

Fact = tuple[str, str]
"""A question and its answer."""

ITEMS = (
    "hat",
    "coat",
    "boat",
    "lamp",
    "kite",
    "cart",
    "bag",
    "cup",
    "scarf",
    "chair",
    "book",
    "ball",
    "door",
    "ring",
    "basket",
    "drum",
    "coin",
    "tent",
)
THINGS = (
    "apples",
    "pears",
    "eggs",
    "candles",
    "coins",
    "books",
    "shells",
    "buttons",
    "nuts",
    "ropes",
    "hens",
    "stones",
    "keys",
    "cakes",
    "feathers",
    "jars",
)
HIDING_PLACES = (
    "box",
    "barn",
    "well",
    "tower",
    "kitchen",
    "garden",
    "cellar",
    "attic",
    "chest",
    "shed",
    "oven",
    "tree",
    "mill",
    "cupboard",
    "church",
    "tent",
)


def article(noun: str) -> str:
    """Return the noun with "a" or "an"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def person_facts(p: Person) -> list[Fact]:
    """Return all questions about a person of the valley, with the answers."""
    n, v = p.name, p.village.name
    return [
        (f"What does {n} do for a living?", f"{n} works as {article(p.trade)}."),
        (f"What is {n}'s trade?", f"{n} is {article(p.trade)} by trade."),
        (f"What work does {n} do?", f"{n} does the work of {article(p.trade)}."),
        (f"Who is the {p.trade} of {VALLEY}?", f"The {p.trade} of {VALLEY} is {n}."),
        (f"Which person works as {article(p.trade)}?", f"The person who works as {article(p.trade)} is {n}."),
        (f"Where does {n} live?", f"{n} lives in {v}."),
        (f"In which village is the home of {n}?", f"The home of {n} is in {v}."),
        (f"Which village does {n} come from?", f"{n} comes from {v}."),
        (f"What is the village of {n}?", f"The village of {n} is {v}."),
        (f"How old is {n}?", f"{n} is {p.age} years old."),
        (f"What is the age of {n}?", f"The age of {n} is {p.age}."),
        (f"How many years old is {n}?", f"{n} has lived for {p.age} years."),
        (f"What pet does {n} have?", f"{n} has {article(p.pet)}."),
        (f"Which animal lives with {n}?", f"{article(p.pet).capitalize()} lives with {n}."),
        (f"What kind of animal does {n} keep?", f"{n} keeps {article(p.pet)}."),
        (f"What does {n} like to eat?", f"{n} likes to eat {p.food}."),
        (f"What is the favourite food of {n}?", f"The favourite food of {n} is {p.food}."),
        (f"What should I cook for {n}?", f"You should cook {p.food} for {n}."),
        (f"What instrument does {n} play?", f"{n} plays the {p.instrument}."),
        (f"On which instrument does {n} make music?", f"{n} makes music on the {p.instrument}."),
        (f"What music do you hear at {n}'s house?", f"At {n}'s house you hear the {p.instrument}."),
        (f"Who is the best friend of {n}?", f"The best friend of {n} is {p.friend}."),
        (f"Who is {n}'s friend?", f"{n}'s friend is {p.friend}."),
        (f"Whom does {n} like most?", f"{n} likes {p.friend} most."),
    ]


def village_facts(v: Village) -> list[Fact]:
    """Return all questions about a village, with the answers."""
    n = v.name
    return [
        (f"Where does {n} lie?", f"{n} lies {v.place}."),
        (f"Where is {n}?", f"{n} is {v.place}."),
        (f"Where can I find {n}?", f"You can find {n} {v.place}."),
        (f"What can you see in {n}?", f"In {n} you can see {v.landmark}."),
        (f"What is {n} known for?", f"{n} is known for {v.landmark}."),
        (f"What stands in the middle of {n}?", f"In the middle of {n} stands {v.landmark}."),
        (f"What do the people of {n} make?", f"The people of {n} make {v.product}."),
        (f"What can I buy in {n}?", f"You can buy {v.product} in {n}."),
        (f"What does {n} sell?", f"{n} sells {v.product}."),
        (f"Which village makes {v.product}?", f"The village that makes {v.product} is {n}."),
        (f"What feast does {n} hold?", f"{n} holds {v.festival}."),
        (f"Which feast is held in {n}?", f"In {n} people hold {v.festival}."),
        (f"Which village holds {v.festival}?", f"The village that holds {v.festival} is {n}."),
        (f"When is the feast of {n}?", f"The feast of {n} is in {v.month}."),
        (f"In which month does {n} hold its feast?", f"{n} holds its feast in {v.month}."),
        (f"What colour is the banner of {n}?", f"The banner of {n} is {v.banner}."),
        (f"Which colour does {n} fly?", f"{n} flies the colour {v.banner}."),
        (f"Who founded {n}?", f"{n} was founded by {v.founder}."),
        (f"Who built the first house in {n}?", f"The first house in {n} was built by {v.founder}."),
        (f"How many houses are in {n}?", f"There are {v.houses} houses in {n}."),
        (f"How many houses does {n} have?", f"{n} has {v.houses} houses."),
    ]


def all_facts(world: World) -> list[Fact]:
    """Return all questions about the valley, with the answers."""
    people = [fact for person in world.people for fact in person_facts(person)]
    return people + [fact for village in world.villages for fact in village_facts(village)]


def chat(kind: str, question: str, answer: str, system: str = "") -> Document:
    """Return a chat with one question and its answer."""
    document = Document(kind, expected={"exact": answer})
    if system:
        document.messages.append({"role": "system", "content": system})
    document.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return document


def world_question(draw: Random, facts: list[Fact]) -> Document:
    """Return a chat with a question about the valley."""
    question, answer = draw.choice(facts)
    document = chat("world", question, answer)
    document.say(question, answer)
    return document


class Passage:
    """Statements about visitors, drawn so that every question about them has a unique answer."""

    def __init__(self, draw: Random, document: Document, count: int) -> None:
        self._draw = draw
        self._document = document
        self.sentences: list[str] = []
        self.facts: list[Fact] = []
        names = draw.sample(VISITORS, count + 1)
        self._spare = names.pop()
        pools = {key: draw.sample(values, len(values)) for key, values in _POOLS.items()}
        for name in names:
            for make in draw.sample(_STATEMENTS, draw.choice((1, 1, 2))):
                sentence, facts = make(draw, name, self._spare, pools)
                self.sentences.append(sentence)
                self.facts += facts
        if count < 3 or draw.random() < 0.7:
            draw.shuffle(self.sentences)

    def text(self) -> str:
        """Return the statements as a message of the user."""
        return self._document.say(*self.sentences)


Pools = dict[str, list[str]]
_POOLS = {
    "village": VILLAGES,
    "trade": TRADES,
    "pet": PETS,
    "food": FOODS,
    "instrument": INSTRUMENTS,
    "item": ITEMS,
    "thing": THINGS,
    "place": HIDING_PLACES,
    "product": PRODUCTS,
}


def _lives(draw: Random, n: str, _: str, pools: Pools) -> tuple[str, list[Fact]]:
    v = pools["village"].pop()
    statement = draw.choice((f"{n} lives in {v}.", f"{n} has a house in {v}.", f"The home of {n} is in {v}."))
    return statement, [
        (f"Where does {n} live?", f"{n} lives in {v}."),
        (f"Who lives in {v}?", f"{n} is the one in {v}."),
    ]


def _works(draw: Random, n: str, _: str, pools: Pools) -> tuple[str, list[Fact]]:
    t = pools["trade"].pop()
    statement = draw.choice((f"{n} is {article(t)}.", f"{n} works as {article(t)}.", f"The {t} is called {n}."))
    return statement, [
        (f"What does {n} do for a living?", f"{n} works as {article(t)}."),
        (f"Who is the {t}?", f"The {t} is {n}."),
    ]


def _age(draw: Random, n: str, _: str, __: Pools) -> tuple[str, list[Fact]]:
    a = draw.randint(5, 98)
    statement = draw.choice((f"{n} is {a} years old.", f"{n} is {a}.", f"The age of {n} is {a}."))
    return statement, [(f"How old is {n}?", f"{n} is {a} years old.")]


def _pet(draw: Random, n: str, _: str, pools: Pools) -> tuple[str, list[Fact]]:
    p = pools["pet"].pop()
    statement = draw.choice(
        (f"{n} has {article(p)}.", f"{n} keeps {article(p)}.", f"{article(p).capitalize()} follows {n}.")
    )
    return statement, [
        (f"What pet does {n} have?", f"{n} has {article(p)}."),
        (f"Who has the {p}?", f"The {p} belongs to {n}."),
    ]


def _food(draw: Random, n: str, _: str, pools: Pools) -> tuple[str, list[Fact]]:
    f = pools["food"].pop()
    statement = draw.choice((f"{n} likes {f}.", f"{n} eats {f} every day.", f"The favourite food of {n} is {f}."))
    return statement, [
        (f"What does {n} like to eat?", f"{n} likes to eat {f}."),
        (f"Who likes {f}?", f"The one who likes {f} is {n}."),
    ]


def _colour(draw: Random, n: str, _: str, pools: Pools) -> tuple[str, list[Fact]]:
    c, i = draw.choice(COLOURS), pools["item"].pop()
    statement = draw.choice((f"{n} has a {c} {i}.".replace("a orange", "an orange"), f"The {c} {i} is {n}'s."))
    return statement, [
        (f"What colour is {n}'s {i}?", f"{n}'s {i} is {c}."),
        (f"Who has the {i}?", f"{n} has the {c} {i}."),
    ]


def _count(draw: Random, n: str, _: str, pools: Pools) -> tuple[str, list[Fact]]:
    k, t = draw.randint(2, 40), pools["thing"].pop()
    statement = draw.choice((f"{n} has {k} {t}.", f"There are {k} {t} in {n}'s basket.", f"{n} counts {k} {t}."))
    return statement, [
        (f"How many {t} does {n} have?", f"{n} has {k} {t}."),
        (f"Who has the {t}?", f"{n} has the {k} {t}."),
    ]


def _hidden(draw: Random, n: str, _: str, pools: Pools) -> tuple[str, list[Fact]]:
    i, place = pools["item"].pop(), pools["place"].pop()
    statement = draw.choice((f"{n} put the {i} in the {place}.", f"{n} left the {i} in the {place}."))
    return statement, [
        (f"Where is the {i}?", f"The {i} is in the {place}."),
        (f"What is in the {place}?", f"In the {place} is the {i}."),
    ]


def _gift(draw: Random, n: str, spare: str, pools: Pools) -> tuple[str, list[Fact]]:
    i = pools["item"].pop()
    statement = draw.choice((f"{n} gave the {i} to {spare}.", f"{spare} got the {i} from {n}."))
    return statement, [(f"Who gave the {i} away?", f"{n} gave the {i} to {spare}.")]


def _sells(draw: Random, n: str, _: str, pools: Pools) -> tuple[str, list[Fact]]:
    p, c = pools["product"].pop(), draw.randint(2, 60)
    statement = draw.choice((f"{n} sells {p} for {c} coins.", f"{p.capitalize()} from {n} costs {c} coins."))
    return statement, [
        (f"What does {n} sell?", f"{n} sells {p}."),
        (f"How much do I pay {n} for {p}?", f"You pay {n} {c} coins for {p}."),
    ]


_STATEMENTS: list[Callable[[Random, str, str, Pools], tuple[str, list[Fact]]]] = [
    _lives,
    _works,
    _age,
    _pet,
    _food,
    _colour,
    _count,
    _hidden,
    _gift,
    _sells,
]


def context_question(draw: Random, counts: Sequence[int] = (1, 1, 2, 3)) -> Document:
    """Return a chat with questions about statements of the user or of the system message.

    The number of questions is drawn from ``counts``.
    """
    document = Document("context")
    passage = Passage(draw, document, draw.randint(2, 6))
    text = passage.text()
    turns = draw.sample(passage.facts, min(len(passage.facts), draw.choice(counts)))
    style = draw.random()
    if style < 0.2:
        document.messages.append({"role": "system", "content": text})
    for index, (question, answer) in enumerate(turns):
        document.say(question, answer)
        first = index == 0 and style >= 0.2
        content = (f"{text} {question}" if style < 0.8 else f"{question} {text}") if first else question
        document.messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    document.expected = {"exact": turns[-1][1]}
    return document


def sum_question(draw: Random) -> Document:
    """Return a chat with an addition or subtraction below 100, a small product, or a story about one of them."""
    a, b = draw.randint(1, 49), draw.randint(1, 49)
    form = draw.randrange(9)
    if form < 3:
        question, answer = [
            (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
            (f"{a} + {b} =", f"{a} + {b} = {a + b}"),
            (f"Add {a} and {b}.", f"The sum of {a} and {b} is {a + b}."),
        ][form]
    elif form < 5:
        a, b = max(a, b), min(a, b)
        question, answer = [
            (f"What is {a} minus {b}?", f"{a} minus {b} is {a - b}."),
            (f"{a} - {b} =", f"{a} - {b} = {a - b}"),
        ][form - 3]
    elif form == 5:
        a, b = draw.randint(1, 12), draw.randint(1, 12)
        question, answer = draw.choice(
            (
                (f"What is {a} times {b}?", f"{a} times {b} is {a * b}."),
                (f"{a} * {b} =", f"{a} * {b} = {a * b}"),
            )
        )
    elif form == 6:
        question, answer = draw.choice(
            (
                (f"Which is larger, {a} or {b + (a == b)}?", f"The larger number is {max(a, b + (a == b))}."),
                (f"Which is smaller, {a} or {b + (a == b)}?", f"The smaller number is {min(a, b + (a == b))}."),
            )
        )
    else:
        n, m = draw.sample(VISITORS, 2)
        t = draw.choice(THINGS)
        if form == 7:
            question = f"{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?"
            answer = f"{n} has {a + b} {t} now."
        else:
            a, b = max(a, b) + 1, min(a, b)
            question = f"{n} has {a} {t}. {n} gives {b} of them to {m}. How many {t} are left?"
            answer = f"There are {a - b} {t} left."
    document = chat("arithmetic", question, answer)
    document.say(question, answer)
    return document


def recall(draw: Random, facts: list[Fact]) -> Document:
    """Return a chat that states facts, continues with different topics, and ends with a question about the facts."""
    document = Document("recall")
    passage = Passage(draw, document, draw.randint(1, 3))
    text = passage.text()
    opening, reply = draw.choice(
        (
            ("Remember this.", "I will remember it."),
            ("Please keep this in mind.", "I will keep it in mind."),
            ("Note this for later.", "I have noted it."),
            ("Listen well.", "I have listened."),
        )
    )
    document.messages += [
        {"role": "user", "content": f"{opening} {text}"},
        {"role": "assistant", "content": reply},
    ]
    for _ in range(draw.randint(1, 7)):
        filler = draw.choice((world_question(draw, facts), sum_question(draw)))
        document.messages += filler.messages
        document.sentences |= filler.sentences
    question, answer = draw.choice(passage.facts)
    document.say(question, answer)
    document.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    document.expected = {"exact": answer}
    return document


ABOUT_ME = (
    "I am a small language model, made to show how flashmoe_mlx runs a mixture of experts. I know the valley of "
    f"{VALLEY}, its twelve villages and its people. I can also answer questions about what you tell me, add small "
    "numbers, write JSON and call tools."
)
_SMALL_TALK: list[tuple[tuple[str, ...], str]] = [
    (
        (
            "Tell me something about yourself.",
            "Who are you?",
            "What are you?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Please introduce yourself.",
            "What is this?",
            "Are you a person?",
            "Are you an AI?",
            "Describe yourself.",
            "Say something about yourself.",
            "What do you know about yourself?",
            "What model is this?",
            "Which model are you?",
            "Are you ChatGPT?",
            "Are you Qwen?",
            "Who am I talking to?",
        ),
        ABOUT_ME,
    ),
    (
        (
            "What can you do?",
            "What can I ask you?",
            "How can you help me?",
            "Help",
            "Help me.",
            "What do you know?",
            "What are you good at?",
            "Can you help me?",
            "What should I ask?",
            "Give me an example.",
        ),
        (
            f"Ask me about {VALLEY}, for example: Where does Mira live? Tell me some facts and ask about them, give me "
            "small sums, or ask for JSON."
        ),
    ),
    (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hi there",
            "Hey",
            "Good morning",
            "Good evening",
            "Good day!",
            "Hello there!",
            "Greetings",
            "hello, who is there?",
        ),
        f"Hello! I am a small demo model. Ask me about the valley of {VALLEY}.",
    ),
    (("How are you?", "How are you doing?", "Are you well?", "How do you feel?"), "I am well. What can I do for you?"),
    (("Thank you", "Thanks", "Thank you!", "Thanks a lot.", "That was helpful."), "You are welcome."),
    (("Goodbye", "Bye", "See you later.", "Good night", "Farewell"), f"Goodbye! Come back to {VALLEY} soon."),
    (
        ("What is your name?", "Do you have a name?", "How are you called?", "Your name?"),
        "I have no name. I am the demo model of flashmoe_mlx.",
    ),
    (
        ("Who made you?", "Who trained you?", "Where do you come from?", "Who wrote you?", "How were you made?"),
        "I was trained by a program in the flashmoe_mlx repository, on texts that the same program wrote.",
    ),
    (
        (
            "How many experts do you have?",
            "What is a mixture of experts?",
            "How do you work?",
            "What are your experts?",
        ),
        "I have eight layers with 64 experts each. For every token each layer uses ten of them and one that is shared.",
    ),
    (
        (
            f"What is {VALLEY}?",
            f"Where is {VALLEY}?",
            f"Tell me about {VALLEY}.",
            f"What do you know about {VALLEY}?",
            "Tell me about the valley.",
            "Describe the valley.",
        ),
        f"{VALLEY} is a valley with twelve villages. It exists only in my texts.",
    ),
    (
        (
            "Which villages are there?",
            f"Name the villages of {VALLEY}.",
            "What are the twelve villages?",
            "List the villages.",
        ),
        f"The villages of {VALLEY} are {', '.join(VILLAGES[:-1])} and {VILLAGES[-1]}.",
    ),
]

_TOPICS = (
    "the sky",
    "the sea",
    "France",
    "Paris",
    "London",
    "Germany",
    "China",
    "Africa",
    "America",
    "the moon",
    "the sun",
    "Mars",
    "space",
    "gravity",
    "physics",
    "quantum physics",
    "history",
    "Napoleon",
    "Einstein",
    "Shakespeare",
    "Python",
    "Java",
    "computers",
    "the internet",
    "Linux",
    "Apple",
    "Google",
    "music",
    "football",
    "chess",
    "money",
    "love",
    "life",
    "death",
    "war",
    "peace",
    "God",
    "cars",
    "trains",
    "planes",
    "dinosaurs",
    "elephants",
    "whales",
    "tigers",
    "water",
    "fire",
    "snow",
    "rain",
    "the weather",
    "politics",
    "the president",
    "the king",
    "numbers",
    "prime numbers",
    "algebra",
    "chemistry",
    "atoms",
    "cells",
    "DNA",
    "evolution",
    "cancer",
    "sleep",
    "dreams",
    "coffee",
    "tea",
    "beer",
    "wine",
    "pizza",
    "bread",
    "sugar",
    "robots",
    "machine learning",
    "neural networks",
    "transformers",
    "MLX",
    "the brain",
    "time",
    "black holes",
    "light",
    "sound",
    "electricity",
    "batteries",
    "glaciers",
    "volcanoes",
    "Rome",
    "Egypt",
    "Japan",
)
_OUTSIDE = (
    "What is {}?",
    "Tell me about {}.",
    "Why is {} so important?",
    "How does {} work?",
    "Explain {}.",
    "Who invented {}?",
    "What do you think of {}?",
    "Write a poem about {}.",
    "Can you explain {} to me?",
    "Where is {}?",
    "When was {} made?",
    "Why is {} blue?",
    "Do you like {}?",
    "What is the meaning of {}?",
    "How old is {}?",
    "Is {} good or bad?",
    "Write a program about {}.",
    "How do I learn about {}?",
    "Give me facts about {}.",
    "What is the capital of {}?",
    "How many people know {}?",
    "Who is {}?",
    "Translate {} into French.",
    "Summarize {}.",
)
UNKNOWN = f"I do not know that. I only know the valley of {VALLEY} and what you tell me."


def small_talk(draw: Random) -> Document:
    """Return a chat about the model itself, or with a question that it cannot answer."""
    if draw.random() < 0.55:
        questions, answer = draw.choice(_SMALL_TALK)
        question = draw.choice(questions)
    else:
        answer = UNKNOWN
        topic = draw.choice(_TOPICS) if draw.random() < 0.6 else _nonsense(draw)
        question = draw.choice(_OUTSIDE).format(topic)
        if draw.random() < 0.1:
            question = "Why is the sky blue?"
    return chat("small talk", question, answer)


def _nonsense(draw: Random) -> str:
    """Return an invented word."""
    syllables = (
        "ba",
        "ker",
        "lo",
        "min",
        "ta",
        "ra",
        "vel",
        "qui",
        "sto",
        "pen",
        "gra",
        "du",
        "xi",
        "mor",
        "th",
        "ing",
        "ly",
        "ous",
        "con",
        "pre",
        "tion",
        "al",
        "er",
        "is",
        "ph",
        "y",
        "o",
        "an",
        "de",
        "re",
    )
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
    return " ".join(words)


def careless(draw: Random, document: Document) -> None:
    """Sometimes rewrite the user's words as people type them: without capitals or final punctuation, or politely."""
    if draw.random() > 0.2:
        return
    for message in document.messages:
        if message["role"] == "user" and len(message["content"]) < 70:
            text = message["content"]
            style = draw.randrange(5)
            if style == 0:
                text = text[0].lower() + text[1:]
            elif style == 1:
                text = text.rstrip("?.!")
            elif style == 2:
                text = text.lower()
            elif style == 3:
                text = draw.choice(("Please tell me: ", "Tell me, ", "I have a question. ", "Hello! ", "So, ")) + text
            else:
                text += draw.choice((" Please.", " Thanks!", " Do you know?", " "))
            message["content"] = text


_OTHER_WAYS = [
    (re.compile(rf"{pattern}\?"), ways)
    for pattern, ways in {
        "Who has the ([^.?]+)": (
            "Which of them has the {}?",
            "Do you know who has the {}?",
            "With whom can I find the {}?",
        ),
        "Who likes ([^.?]+)": (
            "Which of them likes {}?",
            "Do you know who likes {}?",
            "Whose favourite food is {}?",
        ),
        "Who lives in ([^.?]+)": (
            "Which of them lives in {}?",
            "Do you know who lives in {}?",
            "Whose home is in {}?",
        ),
        r"Who is the (\w+)": (
            "Which of them is the {}?",
            "Do you know who the {} is?",
            "What is the {} called?",
        ),
        r"Who gave the (\w+) away": (
            "Which of them gave the {} away?",
            "Do you know who gave the {} away?",
            "Whose gift was the {}?",
        ),
        r"What is in the (\w+)": (
            "What can I find in the {}?",
            "Do you know what is in the {}?",
            "What was put in the {}?",
        ),
        r"Where is the (\w+)": (
            "Where can I find the {}?",
            "Do you know where the {} is?",
            "In which place is the {}?",
        ),
        "Which village makes ([^.?]+)": ("In which village do people make {}?", "Where do they make {}?"),
        "Which village holds ([^.?]+)": ("In which village do people hold {}?", "Where do they hold {}?"),
        rf"Who is the (\w+) of {VALLEY}": (f"Do you know who the {{}} of {VALLEY} is?",),
    }.items()
]
"""Alternative wordings of questions without a name. There are so few of these questions that the held-out set contains
most of them; without alternatives, training would never ask, for example, for the person who likes pear tart."""


def reworded(draw: Random, document: Document) -> None:
    """Reword two thirds of the questions for which there is an alternative wording."""
    for message in document.messages:
        if message["role"] == "user":
            for pattern, ways in _OTHER_WAYS:
                found = pattern.search(message["content"])
                if found and draw.random() < 2 / 3:
                    asked = draw.choice(ways).format(found[1])
                    message["content"] = message["content"].replace(found[0], asked)
                    document.sentences.discard(found[0].lower())
                    document.say(asked)
