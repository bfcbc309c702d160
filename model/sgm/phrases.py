"""What generated messages and facts are made of, by language: `phrases_en`, `phrases_tr`, and what both share."""

from model.sgm import phrases_en, phrases_tr
from model.sgm.turkish import words

SHARED = {
    "n": words("2, 3, 4, 5, 7, 8, 12, 15, 20"),
    "age": words("9, 17, 23, 28, 31, 36, 42, 54, 67"),
    "year": words("1984, 1990, 1995, 2001, 2008, 2015, 2019, 2023"),
    "time": words("7:30, 9, 10:15, 14:00, 18:45, 22"),
    "code": words("Python, Rust, C++, JavaScript, SQL, Go, Java, Haskell, bash"),
    "pet": words("Rex, Luna, Max, Pamuk, Boncuk, Karabaş, Milo, Tarçın, Bella"),
}
FILLERS = {"en": SHARED | phrases_en.FILLERS, "tr": SHARED | phrases_tr.FILLERS}
PHRASES = {"en": phrases_en, "tr": phrases_tr}
LANGUAGES = tuple(PHRASES)
