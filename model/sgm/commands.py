"""Explicit commands in English and Turkish: remember, forget, list.

    parse_command("Unutma ki annem gelecek.")       → Command("remember", "annem gelecek.")
    forget(memory, "#12")                           → ([the entry of that number], [])

Notable: patterns match a whole message from its beginning, and none repeats what may also be something else that it
repeats: a message is read in time proportional to its length. What forgets a pronoun only ("forget you!", "seni unut")
is said to somebody, and no command.
"""

import re
from dataclasses import dataclass

from model.genesis.gate.folding import fold
from model.sgm.memory import ExternalMemory
from model.sgm.memory_entry import MAX_TEXT, Entry
from model.sgm.memory_text import search_words


@dataclass(frozen=True)
class Command:
    """An explicit command: name "remember", "forget" or "list", and what it is about ("" or a kind for list)."""

    name: str
    argument: str


STATEMENT, ANY = "statement", "any"  # whether a message with a question mark may be the command
# A space stands for any number of them. What is remembered is kept as it was written.
_REMEMBER = (
    (ANY, r"/remember (.+)"),
    (
        ANY,
        r"(?:please |can you |could you )?"
        r"(?:remember|memori[sz]e|note|don['’]?t forget|do not forget|keep in mind)"
        r"(?: this| the following)?(?:\s*+[:,]| that | to )(.+)",
    ),
    (
        STATEMENT,
        r"(?:please )?remember "
        r"(?!me\b|when\b|what\b|who\b|how\b|where\b|why\b|the time\b|this\b|that\b)(.+)",
    ),
    (
        ANY,
        r"(?:l[uü]tfen )?(?:[sş]unu |bunu )?(?:hat[ıiIİ]rla|unutma|akl[ıiIİ]nda tut|kaydet|not et|not al)"
        r"(?:\s*+[:,]| ki )(.+)",
    ),
)
# Of a message with single spaces, and without the full stops and exclamation marks at its end.
_FORGET = (
    (ANY, r"/forget (.+)"),
    (
        STATEMENT,
        r"(?:please )?forget(?: that| about|:)? (?!it\b|that\b|this\b|me\b|about\b|everything\b|all\b|what\b)(.+)",
    ),
    (STATEMENT, r"(?:l[uü]tfen )?(?:[sş]unu )?unut ?: ?(.+)"),
    (ANY, r"(?:l[uü]tfen )?unut (#?[0-9]+)"),
    (STATEMENT, r"(?:l[uü]tfen )?(?!bunu\b|[sş]unu\b|onu\b|beni\b|her [sş]eyi\b|hepsini\b)(.+) unut"),
)
_LIST = (
    (ANY, r"/list(?: (facts?|episodes?|skills?))?"),
    (
        ANY,
        r"(?:please )?(?:list|show)(?: me)? (?=\w)(?:all |my |your |the |our )*"
        r"(memories|memory|facts?|episodes?|skills?)?",
    ),
    (ANY, r"list()"),
    (ANY, r"what (?:do|can) you remember(?: about me)? ?\??()"),
    (
        ANY,
        r"(?:l[uü]tfen )?(?:t[uü]m |b[uü]t[uü]n )?"
        r"(haf[ıiIİ]zan[ıiIİ]|an[ıiIİ]lar[ıiIİ]m?[ıiIİ]?|bilgileri|olaylar[ıiIİ]|becerileri) (?:listele|g[oö]ster)",
    ),
    (ANY, r"listele()"),
    (ANY, r"(?:neleri|neler|ne) hat[ıiIİ]rl[ıiIİ]yorsun ?\??()"),
)


def _compiled(patterns: tuple[tuple[str, str], ...], space: str) -> list[tuple[bool, re.Pattern]]:
    """Whether a question may be it, and the pattern."""
    flags = re.IGNORECASE | re.DOTALL
    return [(which == ANY, re.compile(pattern.replace(" ", space), flags)) for which, pattern in patterns]


# \s++ gives nothing back, so that what follows it cannot be looked for among the spaces.
_PATTERNS = [
    ("remember", _compiled(_REMEMBER, r"\s++")),
    ("forget", _compiled(_FORGET, " ")),
    ("list", _compiled(_LIST, " ")),
]
_KIND_WORDS = {"fact": "fact", "epis": "episode", "skil": "skill", "bilg": "fact", "olay": "episode", "bece": "skill"}
# Folded words that name nothing that is remembered, alone or together.
_PRONOUNS = """
i you he she it we they me him her us them mine yours his hers ours theirs myself yourself himself herself itself
ourselves yourselves themselves this that these those one ones someone somebody something anyone anybody anything
everyone everybody everything nobody nothing all both each other others else and or of please now then already again
ever forever
ben sen o biz siz onlar beni seni onu bizi sizi onlari bana sana ona bize size onlara benim senin onun bizim sizin
onlarin bu su bunu sunu bunlar sunlar bunlari sunlari kendimi kendini kendisini kendimizi kendinizi kendilerini hepsini
hepimizi hepinizi herkesi herseyi her seyi birini kimseyi ve de da artik lutfen simdi hemen tamamen
"""


def parse_command(text: str) -> Command | None:
    """The explicit command that a message of at most MAX_TEXT characters is; None for any other message.

    remember that X · remember: X · don't forget X · /remember X · hatırla: X · unutma ki X · not et: X
    forget X · forget #12 · /forget X · X unut · unut: X
    list · list facts · show my memories · what do you remember? · /list · listele · becerileri listele
    """
    text = text.strip()
    if len(text) > MAX_TEXT:
        return None
    line = " ".join(text.split()).rstrip(" .!")
    for name, patterns in _PATTERNS:
        for may_ask, pattern in patterns:
            found = (may_ask or "?" not in text) and pattern.fullmatch(text if name == "remember" else line)
            if not found:
                continue
            argument = (found[1] or "").strip()
            if name == "list":
                return Command(name, _KIND_WORDS.get(fold(argument)[:4], ""))
            nothing = not argument or (name == "forget" and not line.startswith("/") and _is_pronoun(argument))
            if not nothing:
                return Command(name, argument)
    return None


def _is_pronoun(what: str) -> bool:
    words = search_words(what)
    return bool(words) and set(_PRONOUNS.split()).issuperset(words)


def forget(memory: ExternalMemory, what: str) -> tuple[list[Entry], list[Entry]]:
    """Forget the entry of a number ("12", "#12"), or the only one that has all words of a text.

    Returns:
        What is forgotten; and, where several entries have the words, those, of which none is.

    Raises:
        ValueError: "#" and something else than a number.
    """
    if number := re.fullmatch(r"#?([0-9]{1,18})", what):
        entry = memory.forget(int(number[1])) if int(number[1]) else None
        return ([] if entry is None else [entry]), []
    if what.startswith("#"):
        raise ValueError(f"{what!r}: accepted is # and the number of an entry, or words")
    found = memory.forget_matching(what)
    return (found, []) if len(found) == 1 else ([], found)
