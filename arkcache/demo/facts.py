"""Facts to hide in a long text, and the questions that ask for them.

Everything is plain text, so that any model can be asked; the shipped model reads the same sentences
through its own tokenizer, which holds every name and every value as one token. This module knows
nothing of models, tokenizers or caches: `benchmarks/train_demo_model.py` trains on what it renders
and the demonstration asks with it.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

__all__ = [
    "Fact",
    "draw_facts",
    "hide",
    "hide_in_text",
    "is_right",
    "names",
    "parse_answer",
    "render_fact",
    "render_question",
    "spread_depths",
    "values",
]

T = TypeVar("T")

# No name begins another, and all are rare in the training text, so that a name means a fact.
_NAMES = """
    agate alder almond amber anchovy antelope apricot arnica aspen azalea badger balsam banyan
    basalt basil beech begonia beryl birch bittern bluebell bobcat borage bramble briar
    buckwheat bulrush bunting burdock buzzard caiman camellia camphor caraway cardamom caribou
    carnation carob cashew catfish catnip cedar celery chamois cheetah chestnut chicory
    chinchilla chipmunk chive cicada cinnabar cinnamon clematis clover cobalt condor coriander
    cormorant cougar cowslip coyote cranberry crocus cuckoo cumin curlew cyclamen daffodil
    damson dandelion dingo dogwood dolomite dolphin dormouse dragonfly dunlin ebony edelweiss
    egret eland elderberry emerald ermine eucalyptus feldspar fennel ferret finch firefly
    flamingo flint foxglove freesia fritillary fuchsia gannet gardenia garnet gazelle gecko
    gentian geranium gibbon ginseng giraffe gladiolus goldfinch gooseberry goshawk granite
    grouse gypsum halibut hamster hawthorn hazel heather hedgehog hemlock heron hibiscus hickory
    honeydew hornbeam hyacinth hyssop ibex iguana indigo jackal jackdaw jasper juniper kestrel
    kingfisher kumquat lapwing larch larkspur laurel lavender lemur leopard lichen lilac
    limestone linden lizard llama lobelia lotus lupin lychee macaw magnolia magpie mahogany
    malachite mallard manatee marigold marjoram marlin marmot meerkat mimosa mistletoe mongoose
    moonstone mulberry myrtle nasturtium nettle nightjar nutmeg obsidian ocelot okapi oleander
    oregano oriole osprey oyster panther papaya paprika parsley partridge peacock pelican peony
    peregrine petunia pheasant pistachio plover pomelo poplar poppy porcupine porpoise primrose
    puffin pumice quail quince raccoon radish redwood reindeer rhubarb rosemary rowan saffron
    salmon sandstone sapphire sardine seahorse sequoia skylark snowdrop sorrel sparrow spinach
    spruce starling stoat sturgeon sycamore tamarind tangerine tarragon thistle thyme topaz
    tortoise toucan tulip turmeric turquoise verbena vulture wallaby walnut walrus warbler
    weasel wisteria wolverine wombat yarrow zebra zinnia
"""
_NUM_VALUES = 256
# How far (in characters) to look for a line break before a fact goes into the line.
_LINE_CHARS = 200
_FIRST_VALUE, _VALUE_RANGE, _VALUE_STEP = 1000, 9000, 7919


class Fact(NamedTuple):
    """One thing to remember: the value (four digits) of a name (one lower-case word)."""

    name: str
    value: str


def names() -> tuple[str, ...]:
    """The 256 names that facts are about: lower-case English words."""
    return tuple(_NAMES.split())


def values() -> tuple[str, ...]:
    """The 256 values that facts can have: four-digit numbers, all different."""
    # The step and the range share no factor, so that no value comes twice.
    return tuple(
        str(_FIRST_VALUE + _VALUE_STEP * i % _VALUE_RANGE) for i in range(1, _NUM_VALUES + 1)
    )


def draw_facts(num_facts: int, rng: random.Random) -> list[Fact]:
    """Draws `num_facts` facts with different names; values may repeat.

    Raises ValueError where `num_facts` exceeds the number of names.
    """
    if not 0 <= num_facts <= len(names()):
        raise ValueError(f"num_facts is {num_facts}; give 0 to {len(names())}")
    return [Fact(name, rng.choice(values())) for name in rng.sample(names(), num_facts)]


def render_fact(fact: Fact) -> str:
    """The fact as a sentence: "The value of amber is 4821."."""
    return f"The value of {fact.name} is {fact.value}."


def render_question(name: str) -> str:
    """The question for a name: "What is the value of amber?"."""
    return f"What is the value of {name}?"


def parse_answer(text: str) -> str | None:
    """The first four-digit number in a generated answer, or None where there is none."""
    match = re.search(r"(?<!\d)\d{4}(?!\d)", text)
    return match.group() if match else None


def is_right(text: str, fact: Fact) -> bool:
    """Whether the first four-digit number in a generated answer is the fact's value."""
    return parse_answer(text) == fact.value


def spread_depths(num_facts: int, rng: random.Random) -> list[float]:
    """One depth in [0, 1) for each fact: evenly spread with jitter, in shuffled order.

    Depth 0 is the beginning of the text. Every part of the text gets its share of facts.
    """
    depths = [(i + rng.random()) / num_facts for i in range(num_facts)]
    rng.shuffle(depths)
    return depths


def hide(document: Sequence[T], pieces: Sequence[Sequence[T]], positions: Sequence[int]) -> list[T]:
    """Inserts `pieces[i]` before element `positions[i]` of `document`, a list of token ids, say.

    Positions count in the document as given, 0 to its length; pieces at the same position keep
    their order. Raises ValueError for a position outside or a number of positions that differs
    from the number of pieces.
    """
    if len(pieces) != len(positions):
        raise ValueError(f"{len(pieces)} pieces but {len(positions)} positions; give one each")
    if any(not 0 <= position <= len(document) for position in positions):
        raise ValueError(f"positions must be 0 to {len(document)}; got {list(positions)}")
    result: list[T] = []
    start = 0
    for index in sorted(range(len(pieces)), key=positions.__getitem__):
        result.extend(document[start : positions[index]])
        result.extend(pieces[index])
        start = positions[index]
    result.extend(document[start:])
    return result


def hide_in_text(
    document: str,
    facts: Sequence[Fact],
    depths: Sequence[float],
    render: Callable[[Fact], str] = render_fact,
) -> str:
    """Plants each fact near its depth: as a line of its own, or between two words of a long line.

    `depths[i]` in [0, 1] is where in the document fact i belongs; 0 is the beginning.
    """
    positions = [_boundary(document, round(depth * len(document))) for depth in depths]
    pieces = [
        render(fact) + (document[position - 1] if position else "\n")
        for fact, position in zip(facts, positions, strict=True)
    ]
    return "".join(hide(document, pieces, positions))


def _boundary(document: str, position: int) -> int:
    """A position close to `position` that follows a line break, else white space; else 0."""
    for separator in ("\n", " "):
        found = document.find(separator, max(position - 1, 0), position + _LINE_CHARS)
        if found >= 0:
            return found + 1
    return max(document.rfind("\n", 0, position), document.rfind(" ", 0, position)) + 1
