"""The invented valley of Ambervale, drawn from a seed. The demo model knows all facts about it."""

import random
from dataclasses import dataclass

VALLEY = "Ambervale"

VILLAGES = (
    "Brindle",
    "Corrow",
    "Dellmoor",
    "Elmby",
    "Fernholt",
    "Gorsey",
    "Hazelwick",
    "Ivyford",
    "Larkrise",
    "Mossgate",
    "Nettlecombe",
    "Otterby",
)
LANDMARKS = (
    "an old stone bridge",
    "a tall watermill",
    "a round tower",
    "a hollow oak",
    "a bell with no clapper",
    "a blue gate",
    "a well of warm water",
    "a wall of white shells",
    "a sleeping stone lion",
    "a crooked lighthouse",
    "a maze of hedges",
    "a clock that runs backwards",
)
PRODUCTS = (
    "honey",
    "cheese",
    "rope",
    "candles",
    "blue glass",
    "salt",
    "wool",
    "cider",
    "paper",
    "copper pots",
    "pears",
    "boats",
)
PLACES = (
    "by the river",
    "on a hill",
    "in the forest",
    "beside the lake",
    "on the moor",
    "under the cliffs",
    "in the marsh",
    "at the crossroads",
    "near the sea",
    "between two streams",
    "at the foot of the mountain",
    "on an island",
)
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
FESTIVALS = (
    "the lantern feast",
    "the apple fair",
    "the kite race",
    "the night of drums",
    "the goose parade",
    "the boat dance",
    "the snow supper",
    "the bread contest",
    "the day of bells",
    "the mask walk",
    "the candle swim",
    "the wool market",
)
COLOURS = (
    "red",
    "blue",
    "green",
    "yellow",
    "white",
    "black",
    "grey",
    "brown",
    "orange",
    "purple",
    "silver",
    "golden",
    "pink",
)

PEOPLE = (
    "Ada",
    "Bram",
    "Cilla",
    "Doran",
    "Edda",
    "Finn",
    "Greta",
    "Hugo",
    "Ines",
    "Joss",
    "Kira",
    "Lev",
    "Mira",
    "Nils",
    "Orla",
    "Pim",
    "Quill",
    "Rosa",
    "Sven",
    "Tilda",
    "Ulf",
    "Vera",
    "Wren",
    "Yara",
)
TRADES = (
    "baker",
    "miller",
    "smith",
    "weaver",
    "potter",
    "fisher",
    "shepherd",
    "carpenter",
    "gardener",
    "tailor",
    "teacher",
    "healer",
    "mason",
    "cook",
    "painter",
    "sailor",
    "beekeeper",
    "clockmaker",
    "ferryman",
    "printer",
    "cooper",
    "tanner",
    "piper",
    "glazier",
)
PETS = ("cat", "dog", "goat", "parrot", "hen", "pony", "rabbit", "tortoise", "crow", "hedgehog", "goose", "ferret")
FOODS = (
    "plum cake",
    "onion soup",
    "fresh bread",
    "roast trout",
    "pear tart",
    "barley stew",
    "honey cakes",
    "goat cheese",
    "mushroom pie",
    "apple jam",
    "oat porridge",
    "walnut pudding",
)
INSTRUMENTS = (
    "flute",
    "fiddle",
    "drum",
    "harp",
    "horn",
    "lute",
    "whistle",
    "bagpipe",
    "zither",
    "trumpet",
    "cello",
    "organ",
)

VISITORS = (
    "Abel",
    "Alma",
    "Anouk",
    "Arlo",
    "Basil",
    "Beryl",
    "Boris",
    "Carla",
    "Cato",
    "Dina",
    "Duncan",
    "Elsa",
    "Emil",
    "Fay",
    "Felix",
    "Flora",
    "Gideon",
    "Gwen",
    "Hanna",
    "Henk",
    "Ida",
    "Igor",
    "Iris",
    "Jarl",
    "Juno",
    "Kaspar",
    "Lana",
    "Leif",
    "Lotte",
    "Lucas",
    "Mabel",
    "Marco",
    "Nadia",
    "Nora",
    "Odin",
    "Olive",
    "Oskar",
    "Paula",
    "Petra",
    "Rafa",
    "Rhea",
    "Rufus",
    "Sasha",
    "Silas",
    "Stella",
    "Tamsin",
    "Theo",
    "Tobin",
    "Uma",
    "Vance",
    "Viola",
    "Walt",
    "Willa",
    "Xenia",
    "Yusuf",
    "Zelda",
)
"""Names of people who appear only in texts."""


@dataclass(frozen=True, slots=True)
class Village:
    """The facts about a village."""

    name: str
    landmark: str
    product: str
    place: str
    month: str
    festival: str
    banner: str
    founder: str
    houses: int


@dataclass(frozen=True, slots=True)
class Person:
    """The facts about a person."""

    name: str
    village: Village
    trade: str
    age: int
    pet: str
    food: str
    instrument: str
    friend: str


class World:
    """The valley with its villages and people, determined by the seed."""

    def __init__(self, seed: int = 0) -> None:
        draw = random.Random(f"world {seed}")

        def shuffled(values: tuple[str, ...]) -> list[str]:
            return draw.sample(values, len(values))

        people = shuffled(PEOPLE)
        self.villages = [
            Village(*facts, draw.randint(12, 98))
            for facts in zip(
                VILLAGES,
                shuffled(LANDMARKS),
                shuffled(PRODUCTS),
                shuffled(PLACES),
                shuffled(MONTHS),
                shuffled(FESTIVALS),
                shuffled(COLOURS),
                people[:12],
                strict=False,
            )
        ]
        friends = {name: people[(index + 1) % len(people)] for index, name in enumerate(people)}
        homes = [*self.villages, *self.villages]
        draw.shuffle(homes)
        self.people = [
            Person(
                name,
                home,
                trade,
                draw.randint(18, 79),
                draw.choice(PETS),
                draw.choice(FOODS),
                draw.choice(INSTRUMENTS),
                friends[name],
            )
            for name, home, trade in zip(PEOPLE, homes, shuffled(TRADES), strict=True)
        ]
