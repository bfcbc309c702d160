"""Turkish inflection: case suffixes, possession and the past, with vowel harmony.

f"{Word('Ankara'):de}"           → "Ankara'da"
f"{possess('araba', 1):in}"      → "arabamın"
conjugate("git", "did")          → "gittim"
"""

BACK = "aıouAIOU"
HIGH = {"a": "ı", "ı": "ı", "o": "u", "u": "u", "e": "i", "i": "i", "ö": "ü", "ü": "ü"}


class Word(str):
    """A filler; as `{slot:case}` it takes a Turkish case suffix: in, i, e, de or den (genitive to ablative)."""

    def __format__(self, case: str) -> str:
        if not case:
            return str(self)
        lower = self.replace("İ", "i").replace("I", "ı").lower()
        high, low, open_end = harmony(self)
        hard = "t" if lower[-1] in "fstkçşhp" else "d"
        suffix = {
            "in": ("n" if open_end else "") + high + "n",
            "i": ("y" if open_end else "") + high,
            "e": ("y" if open_end else "") + low,
            "de": hard + low,
            "den": hard + low + "n",
        }[case]
        if self[:1].isupper() or self[-1:].isdigit():
            return f"{self!s}'{suffix}"
        softens = lower[-1] == "k" and suffix[0] in HIGH and sum(c in HIGH for c in lower) > 1
        return (self[:-1] + "ğ" if softens else str(self)) + suffix


def words(text: str) -> tuple[Word, ...]:
    """The words of a list with commas."""
    return tuple(Word(word.strip()) for word in text.split(","))


def harmony(word: str) -> tuple[str, str, bool]:
    """The high and the low vowel of a suffix after the word, and whether the word ends in a vowel."""
    lower = word.replace("İ", "i").replace("I", "ı").lower()
    last = next((c for c in reversed(lower) if c in HIGH), "e")
    return HIGH[last], "a" if last in BACK else "e", lower[-1] in HIGH


class Possessed(str):
    """A Turkish noun of someone's: "arabam", "Ayşe'nin arabası"; cases come after the possessive."""

    third = False

    def __format__(self, case: str) -> str:
        high, low, _ = harmony(self)
        link = "n" if self.third else ""
        return str(self) + {"": "", "in": link + high + "n", "i": link + high, "e": link + low}[case]


def possess(noun: str, person: int) -> Possessed:
    """The Turkish noun of the first, second or third person singular."""
    ending = ("m", "n", "")[person - 1]
    if "{}" in noun:
        return Possessed(noun.format("ği" + ending))
    high, _, open_end = harmony(noun)
    stem = noun[:-1] + "ğ" if noun[-1] == "k" and sum(c in HIGH for c in noun.split()[-1]) > 1 else noun
    if person == 3:
        word = Possessed(stem + ("s" if open_end else "") + high)
        word.third = True
    else:
        word = Possessed(stem + ("" if open_end else high) + ending)
    return word


def conjugate(stem: str, form: str) -> str:
    """A Turkish verb's past: I (did), you, I once (had); its participle (that) or infinitive (to)."""
    high, low, _ = harmony(stem)
    hard = "t" if stem[-1] in "fstkçşhp" else "d"
    inner = HIGH[high]
    endings = {
        "did": hard + high + "m",
        "you": hard + high + "n",
        "had": f"m{high}şt{inner}m",
        "that": f"{hard}{high}ğ{high}m{high}",
        "to": f"m{low}k",
    }
    return stem + endings[form]
