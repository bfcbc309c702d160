"""The words of needles in haystacks: neutral sentences, needles and their questions, in English and Turkish.

Sentences contain no digit and no key word, so an answer stands in a prompt once: in its needle. `needles` are learned
from (model.data.recall) and tested; `held_out` phrasings are only ever tested.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

KEY_BYTES = 4  # of every key, so that the answers of a batch have one length
DIGIT_KEYS = 10**KEY_BYTES


@dataclass(frozen=True)
class Language:
    """Parts of sentences. `sentence` and the needles are templates over the other fields.

    needles: (needle, question up to the answer), both over {who}, the needle also over {key}.
    held_out: the same, in words that no task to learn from has.
    keys: words of KEY_BYTES bytes that occur nowhere else in the language's sentences.
    """

    sentences: tuple[str, ...]
    subjects: tuple[str, ...]
    adjectives: tuple[str, ...]
    objects: tuple[str, ...]
    verbs: tuple[str, ...]
    places: tuple[str, ...]
    times: tuple[str, ...]
    who: tuple[str, ...]
    needles: tuple[tuple[str, str], ...]
    held_out: tuple[tuple[str, str], ...]
    keys: tuple[str, ...]
    capital_i: str = "I"

    def haystack(self, rng: random.Random) -> Iterator[str]:
        """Endless sentences; one that was already used is drawn again while new ones are easy to find."""
        used = set()
        parts = ("subjects", "adjectives", "objects", "verbs", "places", "times")
        while True:
            for _ in range(20):
                words = {part[:-1]: rng.choice(getattr(self, part)) for part in parts}
                sentence = rng.choice(self.sentences).format(**words)
                capital = self.capital_i if sentence[0] == "i" else sentence[0].upper()
                sentence = capital + sentence[1:]
                if sentence not in used:
                    break
            used.add(sentence)
            yield sentence


def words(text: str) -> tuple[str, ...]:
    """The words of a line."""
    return tuple(text.split())


ENGLISH = Language(
    sentences=(
        "{time} the {subject} {verb} the {adjective} {object} {place}.",
        "the {adjective} {subject} {verb} the {object} {place} {time}.",
        "{place} the {subject} {verb} the {adjective} {object}.",
    ),
    subjects=words(
        "farmer teacher sailor painter doctor baker student traveller merchant writer gardener neighbour singer "
        "carpenter soldier nurse hunter shepherd tailor potter"
    ),
    adjectives=words(
        "old small wooden quiet heavy broken golden simple strange yellow narrow pleasant empty famous gentle "
        "dusty curious modern humble bright"
    ),
    objects=words(
        "table letter basket window picture garden machine blanket bottle carriage mirror ladder newspaper hammer "
        "violin curtain umbrella saddle lantern wagon"
    ),
    verbs=words("carried painted noticed repaired borrowed admired described forgot cleaned sold"),
    places=(
        "near the river",
        "behind the church",
        "in the market",
        "on the hill",
        "at the station",
        "beside the old bridge",
        "in a small village",
        "under the trees",
        "across the street",
        "by the harbour",
    ),
    times=(
        "in the morning",
        "after the rain",
        "before sunset",
        "last winter",
        "every summer",
        "on a cold evening",
        "during the holiday",
        "at noon",
        "some years ago",
        "one quiet night",
    ),
    who=words("Anna Robert Maria Thomas Helen Daniel Clara George"),
    needles=(
        ("The secret code of {who} is {key}.", "What is the secret code of {who}? The secret code of {who} is "),
        ("{who} chose the password {key}.", "Which password did {who} choose? {who} chose the password "),
        ("Remember this about {who}: the answer is {key}.", "Now recall. Remember this about {who}: the answer is "),
        ("The key of {who} is {key}.", "Tell me the key of {who}. It is "),
        ("{who} lives at number {key}.", "Where does {who} live? At number "),
        ("Note that {who} has the badge {key}.", "Which badge does {who} have? The badge "),
    ),
    held_out=(
        ("The safe of {who} opens with {key}.", "What opens the safe of {who}? The safe of {who} opens with "),
        ("For {who} the magic word is {key}.", "What is the magic word for {who}? The magic word is "),
    ),
    keys=words(
        "bird lamp frog rust ship corn drum wolf salt moon kite pear rope milk iron crab leaf tent jazz plum "
        "coin duck fork harp knot lion mint nail opal palm quiz ruby"
    ),
)

TURKISH = Language(
    sentences=(
        "{time} {subject} {place} {adjective} bir {object} {verb}.",
        "{adjective} {subject} {time} {place} bir {object} {verb}.",
        "{place} {subject} {adjective} bir {object} {verb}.",
    ),
    subjects=words(
        "çiftçi öğretmen denizci ressam doktor fırıncı öğrenci yolcu tüccar yazar bahçıvan komşu şarkıcı marangoz "
        "asker hemşire avcı çoban terzi çömlekçi"
    ),
    adjectives=words(
        "eski küçük ahşap sessiz ağır kırık güzel basit garip sarı dar hoş boş ünlü ince tozlu ilginç yeni sade parlak"
    ),
    objects=words(
        "mektup sepet pencere resim bahçe makine battaniye şişe araç ayna merdiven dergi çekiç keman perde şemsiye "
        "eyer fener vagon sandık"
    ),
    verbs=words("taşıdı boyadı gördü onardı aldı beğendi anlattı unuttu temizledi sattı"),
    places=(
        "nehrin yanında",
        "caminin arkasında",
        "çarşıda",
        "tepenin üstünde",
        "istasyonda",
        "köprünün yanında",
        "küçük bir köyde",
        "ağaçların altında",
        "sokağın karşısında",
        "limanda",
    ),
    times=(
        "sabahleyin",
        "yağmurdan sonra",
        "gün batmadan",
        "geçen kış",
        "her yaz",
        "soğuk bir akşam",
        "tatil boyunca",
        "öğle vakti",
        "yıllar önce",
        "sessiz bir gece",
    ),
    who=words("Ayşe Mehmet Zeynep Mustafa Elif Hüseyin Gülay Çetin"),
    needles=(
        ("{who} için gizli kod {key} olarak seçildi.", "{who} için gizli kod nedir? {who} için gizli kod "),
        ("{who} tarafından seçilen parola: {key}.", "Parola hangisi? {who} tarafından seçilen parola: "),
        ("{who} hakkında bunu unutma: cevap {key}.", "Şimdi hatırla. {who} hakkında bunu unutma: cevap "),
        ("{who} adlı kişinin anahtarı {key}.", "{who} adlı kişinin anahtarını söyle. Anahtar "),
        ("{who} şu numarada oturuyor: {key}.", "{who} nerede oturuyor? Numarası "),
        ("Not et, {who} için rozet {key}.", "{who} hangi rozeti taşıyor? Rozet "),
    ),
    held_out=(
        ("{who} kasasını {key} ile açıyor.", "{who} kasasını ne ile açıyor? {who} kasasını "),
        ("{who} için sihirli söz {key}.", "{who} için sihirli söz nedir? Sihirli söz "),
    ),
    keys=words(
        "elma kedi kuzu balo deve lale nane nota rota saat okul ordu uzay bina etek fare gemi inek kafa kova mavi "
        "moda pide sera vazo zeka yaka"
    ),
    capital_i="İ",
)

LANGUAGES = {"en": ENGLISH, "tr": TURKISH}
