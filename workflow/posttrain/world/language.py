"""The language of the built-in world, of some 400 words: its vocabulary, its facts and orders, and their wordings."""


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "anna tom mary john lucy peter sara paul emma jack nora david alice frank rosa henry "
    "julia mark clara simon eva leo ruth oscar helen max diana carl vera hugo irene felix"
)
OBJECTS = _words(
    "ball cup key box hat book lamp coin ring rope map knife spoon plate chair table "
    "clock bell drum flute shoe coat glove scarf bag boat kite doll brush comb pen stone"
)
PLACES = _words("garden kitchen cellar attic garage hall tower barn")
NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)


def _pairs(text: str) -> dict[str, str]:
    """{"france": "paris", ...} from "france paris, ..."."""
    return dict(entry.split() for entry in text.split(","))


def _classes(text: str) -> dict[str, str]:
    """{"whale": "sea", "shark": "sea", ...} from "sea: whale shark, ..."."""
    rows = (entry.split(":") for entry in text.split(","))
    return {member: name.strip() for name, members in rows for member in members.split()}


CAPITALS = _pairs(
    "france paris, spain madrid, italy rome, germany berlin, poland warsaw, austria vienna, greece athens, "
    "portugal lisbon, norway oslo, sweden stockholm, finland helsinki, denmark copenhagen, ireland dublin, "
    "russia moscow, egypt cairo, kenya nairobi, japan tokyo, china beijing, india delhi, korea seoul, "
    "cuba havana, peru lima, chile santiago, canada ottawa"
)
OPPOSITES = _pairs(
    "hot cold, big small, fast slow, up down, open closed, hard soft, wet dry, old new, happy sad, "
    "rich poor, strong weak, light dark, full empty, early late, high low, long short, loud quiet, "
    "clean dirty, near far, buy sell"
)
HOMES = _classes(
    "sea: whale shark dolphin crab, farm: cow horse pig sheep, forest: bear wolf fox deer, "
    "desert: camel scorpion cobra lizard, river: trout otter beaver frog, mountain: eagle yak goat puma"
)
COLOURS = _classes(
    "green: grass leaf pea, blue: sky ocean sapphire, white: milk salt swan, black: coal raven night, "
    "red: blood tomato cherry, yellow: lemon sun butter, brown: mud bark chocolate, grey: ash smoke elephant"
)
# SIZES and WEIGHTS: from the least to the most.
SIZES = _words(
    "ant bee mouse frog crab otter fox goat wolf sheep deer pig lizard lion cow horse camel bear shark elephant whale"
)
WEIGHTS = _words(
    "pin coin ring key comb pen spoon brush cup glove hat shoe book lamp bell drum coat chair kite box table boat"
)

# Knowledge: kind -> (table, wordings of the question, wordings of the statement).
KNOWLEDGE: dict[str, tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]] = {
    "capital": (
        CAPITALS,
        ("what is the capital of {k}?", "name the capital of {k}.", "tell me the capital of {k}."),
        ("the capital of {k} is {v}.", "{v} is the capital of {k}.", "everyone knows the capital of {k}, {v}."),
    ),
    "opposite": (
        OPPOSITES | {b: a for a, b in OPPOSITES.items()},
        ("what is the opposite of {k}?", "name the opposite of {k}.", "tell me the opposite of {k}."),
        ("the opposite of {k} is {v}.", "{v} is the opposite of {k}.", "we know the opposite of {k}, {v}."),
    ),
    "home": (
        HOMES,
        ("what is the home of the {k}?", "name the home of the {k}.", "tell me the home of the {k}."),
        ("the home of the {k} is the {v}.", "the {v} is the home of the {k}.", "we know the home of the {k}, the {v}."),
    ),
    "colour": (
        COLOURS,
        ("what is the colour of {k}?", "name the colour of {k}.", "tell me the colour of {k}."),
        ("the colour of {k} is {v}.", "{v} is the colour of {k}.", "we know the colour of {k}, {v}."),
    ),
}

# Order: kind -> (least to most, wordings of the question, wordings of the statement).
ORDER: dict[str, tuple[list[str], tuple[str, ...], tuple[str, ...]]] = {
    "biggest": (
        SIZES,
        ("which is the biggest: {w}?", "name the biggest: {w}.", "tell me the biggest: {w}."),
        ("the {b} is bigger than the {a}.", "the {a} is smaller than the {b}."),
    ),
    "heaviest": (
        WEIGHTS,
        ("which is the heaviest: {w}?", "name the heaviest: {w}.", "tell me the heaviest: {w}."),
        ("the {b} is heavier than the {a}.", "the {a} is lighter than the {b}."),
    ),
    "highest": (
        NUMBERS,
        ("which is the highest: {w}?", "name the highest: {w}.", "tell me the highest: {w}."),
        ("{b} is higher than {a}.", "{a} is lower than {b}."),
    ),
}
KINDS = (*KNOWLEDGE, *ORDER)
