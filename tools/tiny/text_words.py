"""WordNet for the tiny Step3's texts: meanings, example sentences, and questions about what a word means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

NUM_FREQUENT_NOUNS = 600
# WordNet's lexicographer files: 05 animal, 06 artifact, 08 body, 13 food, 17 object, 18 person,
# 19 phenomenon, 20 plant.
DRAWN_FILES = ("05", "06", "13", "17", "20", "19", "18", "08")
NOUN_FILES = ("05", "06", "08", "13", "17", "20")
OFFENSIVE_TERM = re.compile(
    r"(offensive|obscene|vulgar|disparaging|derogatory|coarse) (and \w+ )?(term|name|slang|word)"
)
UNFIT_GLOSS = re.compile(r"sexual|obscen|ethnic slur|genital|prostitut|\brape\b")
# Nouns that take no article, and plural ones, among the words asked about.
UNCOUNTED = frozenset(
    "air alcohol armor pollen mulch baseball chalk chlorothiazide cytoplasm gauze gear knitwear lather "
    "lingerie lumber linen mud paneling art bacon beef beer blood brandy bread butter cattle champagne "
    "cheese china clay clothing coffee corn cotton cream dirt equipment fire flesh flour foliage food "
    "fruit furniture garlic glass gold grass hair hay honey ice ivory jewelry juice leather lightning "
    "liquor livestock machinery material meat medicine milk music mutton oil paper pasta plumage pork "
    "poultry powder property rice rum salt silk skin snow soap soup spaghetti sugar sushi tea timber "
    "tissue tobacco transportation underwear vodka water weaponry wheat whiskey whisky wine wool masonry "
    "algae housing sod ammunition artillery merchandise cargo stock headgear footwear".split()
)
UNCOUNTED_PAIRS = frozenset({"ice cream"})
PLURAL = frozenset(
    "scissors glasses clothes trousers jeans grapes cherries chopsticks eyeglasses sunglasses shoes".split()
)
# Replacements where WordNet's gloss is long, odd or about something else.
DRAWN_DEFINITIONS = {
    "apple": "a round fruit with red, yellow or green skin and crisp white flesh",
    "banana": "a long curved yellow fruit with soft sweet flesh",
    "book": "a written work printed on pages bound together",
    "bread": "a food made from dough of flour or meal and then baked",
    "bus": "a large vehicle carrying many passengers",
    "cake": "a sweet baked food made from flour, sugar and eggs",
    "camera": "a device for taking photographs",
    "cat": "a small furry animal often kept as a pet",
    "cherries": "small round red fruits with a hard stone",
    "cow": "a large farm animal that gives milk",
    "crab": "a sea animal with a hard shell and two large claws",
    "crown": "a jewelled headdress worn by a king or a queen",
    "dog": "a domesticated animal that barks and is often kept as a pet",
    "doughnut": "a small ring-shaped fried cake",
    "elephant": "a very large gray animal with a long trunk and tusks",
    "fish": "an animal that lives in water and breathes through gills",
    "glasses": "a pair of lenses in a frame for seeing better",
    "grapes": "small juicy fruits that grow in clusters on a vine",
    "hamburger": "a sandwich with a fried cake of minced beef in a bun",
    "hammer": "a hand tool with a heavy head used to drive nails",
    "horse": "a large animal with hooves that people ride",
    "key": "a metal device that opens or closes a lock",
    "lion": "a large wild cat of Africa and India whose male has a mane",
    "ladybug": "a small round red beetle with black spots",
    "light bulb": "an electric lamp made of glass",
    "mushroom": "a fungus with a stem and a cap",
    "octopus": "a sea animal with a soft body and eight long arms",
    "panda": "a large black and white animal that lives in China and eats bamboo",
    "penguin": "a black and white sea bird that swims but cannot fly",
    "pig": "a fat farm animal with a flat nose and a curly tail",
    "pineapple": "a large tropical fruit with sweet flesh and stiff leaves",
    "pizza": "an Italian open pie of thin dough with tomato sauce and cheese",
    "rabbit": "a small animal with long ears and a short tail",
    "rose": "a flower with a sweet smell that grows on a thorny shrub",
    "scissors": "a cutting tool with two crossed blades",
    "snail": "a small slow animal with a spiral shell",
    "snake": "a long reptile without legs",
    "spider": "a small animal with eight legs that spins webs",
    "sunflower": "a tall plant with large yellow flower heads",
    "telephone": "a device for talking to people who are far away",
    "television": "a device that shows moving pictures sent from far away",
    "tractor": "a farm vehicle with large wheels that pulls heavy loads",
    "train": "a line of railway cars coupled together",
    "turtle": "a reptile with a hard shell that lives in water",
    "umbrella": "a folding canopy that protects from the rain",
    "watermelon": "a large green fruit with red juicy flesh",
    "whale": "a very large mammal that lives in the sea",
}
# Frequent nouns whose first sense is not the one that comes to mind, or is badly worded.
SKIPPED_NOUNS = frozenset(
    "agent back barley biceps chicken clip coconut dinner dive female holder instrumentation latticework "
    "lat mount oak original piece premix queen repertory short suds swallow assembly plane opium scenery "
    "dough capsule classic stretch architecture foam serum bracing reserve male turkey lamb duck salmon "
    "tuna shrimp lobster goose block stand young dice die wash draw round glove globe cab bow bluff "
    "frame andrena bristle tissue".split()
)
UNIQUE = frozenset("earth ground moon sea sky sun world universe hypothalamus abdomen aorta spine shore coast".split())
DEFINITION_QUESTIONS = (
    "What {1} {0}?",
    "Tell me what {0} {1}.",
    "Can you explain what {0} {1}?",
    "Define {2}.",
)


@dataclass(frozen=True)
class Synset:
    """One WordNet meaning: its offset, lexicographer file, words, definition and example sentences."""

    offset: str
    lex_file: str
    words: tuple[str, ...]
    definition: str
    sentences: tuple[str, ...]


def read_synsets(wordnet: Path, part: str) -> list[Synset]:
    """Reads `data.<part>` (part: noun, verb, adj or adv); the format is WordNet's wndb(5)."""
    synsets = []
    for line in (wordnet / f"data.{part}").read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):
            continue  # the licence at the top
        data, gloss = line.split("|", 1)
        fields = data.split()
        words = tuple(
            re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        )
        # In a gloss with an odd number of quotes the pairs are ambiguous: its sentences are left out.
        quoted = re.findall(r'"([^"]*)"', gloss) if gloss.count('"') % 2 == 0 else []
        sentences = tuple(filter(None, map(clean_sentence, quoted)))
        definition = " ".join(gloss.split('"')[0].split()).rstrip(" ;:,-")
        synsets.append(Synset(fields[0], fields[1], words, definition, sentences))
    return synsets


def clean_sentence(text: str) -> str:
    """Squeezes white space; returns "" for anything but a sentence or phrase (one word, stray punctuation)."""
    text = " ".join(text.split()).strip(" ;:,`")
    is_clean = (
        len(text) >= 8 and " " in text and not text.startswith(("-", ")", "'s ")) and text.count("(") == text.count(")")
    )
    return text if is_clean else ""


def offensive_words(synsets: Iterable[Synset]) -> re.Pattern[str]:
    """A pattern of the words that WordNet itself marks as offensive or obscene."""
    words = {word for s in synsets if OFFENSIVE_TERM.search(s.definition) for word in s.words if word.islower()}
    words = {word for word in words if " " not in word} - {"boy", "runt"}  # offensive in a rare sense only
    return re.compile(r"\b(" + "|".join(sorted(map(re.escape, words))) + r")(s|ed|ing)?\b", re.IGNORECASE)


def with_article(noun: str) -> str:
    """Gives "an apple", "milk", "scissors", "the sun"."""
    if noun in UNIQUE:
        return f"the {noun}"
    if noun in UNCOUNTED | UNCOUNTED_PAIRS | PLURAL:
        return noun
    vowel = noun[0] in "aeiou" and not re.match(r"uni|use|eur|one\b|ukul", noun)
    return ("an " if vowel or re.match(r"hour|hono|heir", noun) else "a ") + noun


def shorten_definition(definition: str) -> str:
    """The first clause of a gloss, without remarks in brackets."""
    text = re.sub(r"\s*\([^)]*\)", "", definition).strip()
    text = re.split("[;:]", text)[0].strip(" ,.")
    return text if len(text) <= 110 else re.split(r", | (?:and|or|that|which|with) ", text[:110])[0].strip()


def definition_sentence(noun: str, definition: str) -> str:
    """Gives "A violin is a bowed stringed instrument." for "violin", "bowed stringed instrument"."""
    text = shorten_definition(definition)
    if not re.match(r"(an?|the|any|one|some\w*|either|each|all|small|very) ", text) and noun not in PLURAL:
        first = text.split()[0]
        plural_head = re.search(r"^(\w+ly )?(\w+ )?\w+(ing|wear|ware|meat|flesh|fruit|food)$", text) is not None
        text = text if plural_head or noun in UNCOUNTED else with_article(first) + text[len(first) :]
    subject = with_article(noun)
    return f"{subject[0].upper()}{subject[1:]} {'are' if noun in PLURAL else 'is'} {text}."


def definition_rows(wordnet: Path, nouns: Sequence[Synset], things: Sequence[str]) -> list[dict[str, str]]:
    """Questions about the drawn things, then about the most frequent concrete nouns."""
    by_offset = {s.offset: s for s in nouns}
    senses: dict[str, list[Synset]] = {}
    for line in (wordnet / "index.noun").read_text(encoding="latin-1").splitlines():
        if not line.startswith("  "):
            fields = line.split()
            senses[fields[0].replace("_", " ")] = [by_offset[o] for o in fields if len(o) == 8 and o in by_offset]
    frequency: Counter[str] = Counter()
    for line in (wordnet / "cntlist.rev").read_text(encoding="latin-1").splitlines():
        key, sense, count = line.split()
        lemma, rest = key.split("%")
        if rest.startswith("1:") and sense == "1":
            frequency[lemma] += int(count)

    meanings: dict[str, str] = {}
    for thing in things:
        found = DRAWN_DEFINITIONS.get(thing) or next(
            (s.definition for s in senses.get(thing, []) if s.lex_file in DRAWN_FILES), None
        )
        if found:
            meanings[thing] = found
    limit = len(meanings) + NUM_FREQUENT_NOUNS
    for noun, _ in sorted(frequency.items(), key=lambda item: (-item[1], item[0])):
        first = senses.get(noun, [None])[0]
        if first is None or noun in meanings or noun in SKIPPED_NOUNS or len(meanings) == limit:
            continue
        is_good = (
            first.lex_file in NOUN_FILES
            and noun.isalpha()
            and noun in first.words  # in lower case: not a name
            and not (noun.endswith("s") and noun[:-1] in senses)  # not a plural
            and re.match(r"(an?|the|any|one of) ", re.sub(r"^\([^)]*\) ?", "", first.definition))
            and len(first.definition.split(";")[0]) <= 100
            and not UNFIT_GLOSS.search(first.definition)
        )
        if is_good:
            meanings[noun] = first.definition
    rows = []
    for noun, definition in meanings.items():
        verb = "are" if noun in PLURAL else "is"
        for question in DEFINITION_QUESTIONS:
            text = question.format(with_article(noun), verb, noun)
            rows.append(
                chat_row(
                    text,
                    "The user asks what a word means.",
                    definition_sentence(noun, definition),
                    "definition",
                )
            )
    return rows


def chat_row(question: str, reasoning: str, answer: str, kind: str) -> dict[str, str]:
    """One question with its answer, as every chat file but the tool calls holds it."""
    return {"question": question, "reasoning": reasoning, "answer": answer, "kind": kind}
