"""The words of needles in haystacks: neutral sentences, needles and their questions, in English and Turkish.

Sentences contain no digit and no key word, so an answer stands in a prompt once: in its needle. `needles` are learned
from (model.data.recall) and tested; `held_out` phrasings are only ever tested. The same holds of neutral sentences:
those of `haystack` are only ever tested, those of `asides` only learned from, and they speak of other things.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

KEY_BYTES = 4  # of every key, so that the answers of a batch have one length
DIGIT_KEYS = 10**KEY_BYTES


@dataclass(frozen=True)
class Sentences:
    """Neutral sentences: `templates` over {subject}, {adjective}, {object}, {verb}, {place} and {time}."""

    templates: tuple[str, ...]
    subjects: tuple[str, ...]
    adjectives: tuple[str, ...]
    objects: tuple[str, ...]
    verbs: tuple[str, ...]
    places: tuple[str, ...]
    times: tuple[str, ...]
    capital_i: str = "I"

    def draw(self, rng: random.Random) -> Iterator[str]:
        """Endless sentences; one that was already used is drawn again while new ones are easy to find."""
        used = set()
        parts = ("subjects", "adjectives", "objects", "verbs", "places", "times")
        while True:
            for _ in range(20):
                words = {part[:-1]: rng.choice(getattr(self, part)) for part in parts}
                sentence = rng.choice(self.templates).format(**words)
                capital = self.capital_i if sentence[0] == "i" else sentence[0].upper()
                sentence = capital + sentence[1:]
                if sentence not in used:
                    break
            used.add(sentence)
            yield sentence


@dataclass(frozen=True)
class Language:
    """What is told and asked in a language, and what is not worth remembering.

    haystack: sentences around a needle that is tested.
    asides: sentences in tasks that are learned from.
    needles: (needle, question up to the answer), both over {who}, the needle also over {key}.
    taught: the same, over one of `things` too: many ways of saying what is to be remembered, which are not tested, so
        that it is not the words of `needles` alone that are learned.
    held_out: as `needles`, of something, and in a form of words, that no task to learn from has.
    keys: words of KEY_BYTES bytes that occur nowhere else in the language.
    """

    haystack: Sentences
    asides: Sentences
    who: tuple[str, ...]
    needles: tuple[tuple[str, str], ...]
    taught: tuple[tuple[str, str], ...]
    things: tuple[str, ...]
    held_out: tuple[tuple[str, str], ...]
    keys: tuple[str, ...]


def words(text: str) -> tuple[str, ...]:
    """The words of a line."""
    return tuple(text.split())


_ENGLISH_HAYSTACK = Sentences(
    templates=(
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
)

_ENGLISH_ASIDES = Sentences(
    templates=(
        "{subject} {verb} {object} {place}, which was {adjective}.",
        "nobody knew why {subject} {verb} the {adjective} {object} {time}.",
        "{time}, {place}, {subject} {verb} another {object}.",
        "it was {adjective} that {subject} {verb} so many {object}s {place}.",
        "then {subject} and the others {verb} their {object}s.",
    ),
    subjects=(
        *words("Peter Alice Martin Sophie Victor Laura Oscar Irene he she everybody someone mother father"),
        *("the captain", "the judge", "the miller", "my uncle", "a stranger", "the queen", "our guest", "the clerk"),
    ),
    adjectives=words(
        "late cheap certain rare warm dark clever clean sweet lively polished dangerous silent green round useful "
        "cruel polite deep rich"
    ),
    objects=words(
        "candle stone spoon pillow glove barrel statue ticket button feather blade wheel pencil map bell ribbon drawer "
        "shovel needle cradle"
    ),
    verbs=words("bought hid opened burned counted followed broke washed moved found wanted lost mended praised"),
    places=(
        "in the kitchen",
        "on the deck",
        "above the clouds",
        "at the palace",
        "between two walls",
        "inside the cave",
        "far from home",
        "along the road",
        "by the fire",
        "in the theatre",
    ),
    times=(
        "yesterday",
        "at midnight",
        "in early spring",
        "during the war",
        "once a week",
        "after supper",
        "long before that",
        "on Sunday",
        "when it snowed",
        "for a while",
    ),
)

ENGLISH = Language(
    haystack=_ENGLISH_HAYSTACK,
    asides=_ENGLISH_ASIDES,
    who=words("Anna Robert Maria Thomas Helen Daniel Clara George"),
    needles=(
        ("The secret code of {who} is {key}.", "What is the secret code of {who}? The secret code of {who} is "),
        ("{who} chose the password {key}.", "Which password did {who} choose? {who} chose the password "),
        ("Remember this about {who}: the answer is {key}.", "Now recall. Remember this about {who}: the answer is "),
        ("The key of {who} is {key}.", "Tell me the key of {who}. It is "),
        ("{who} lives at number {key}.", "Where does {who} live? At number "),
        ("Note that {who} has the badge {key}.", "Which badge does {who} have? The badge "),
    ),
    taught=(
        ("The {thing} of {who} is {key}.", "What is the {thing} of {who}? The {thing} of {who} is "),
        ("The {thing} of {who} is {key}.", "{who} has which {thing}? It is "),
        ("{who} has the {thing} {key}.", "What {thing} does {who} have? {who} has the {thing} "),
        ("{key} is the {thing} of {who}.", "Say the {thing} of {who}: "),
        ("The {thing} that {who} got was {key}.", "Which {thing} did {who} get? "),
        ("For the {thing}, {who} wrote {key}.", "What did {who} write for the {thing}? {who} wrote "),
        ("{who} told me the {thing}: {key}.", "What was the {thing} that {who} told me? "),
        ("They gave {who} {key} as the {thing}.", "Which {thing} did they give {who}? They gave {who} "),
        ("{who}, {thing}: {key}.", "{who}, {thing}: "),
        ("Do not forget that the {thing} of {who} will be {key}.", "What will the {thing} of {who} be? It will be "),
        ("In the list, {who} stands under {thing} {key}.", "Where does {who} stand in the list? Under {thing} "),
        ("When asked for the {thing}, {who} says {key}.", "Asked for the {thing}, what does {who} say? {who} says "),
    ),
    things=(
        *words("room ticket seat locker telephone street file nickname bus train medal bell house team prize signal"),
        *("room number", "favourite word", "entry code", "bank account", "library card", "flight number", "user name"),
        *("birth year", "family name", "second password", "pin code", "order number", "home town", "lucky number"),
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

_TURKISH_HAYSTACK = Sentences(
    templates=(
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
    capital_i="İ",
)

_TURKISH_ASIDES = Sentences(
    templates=(
        "{subject} {place} {object} {verb}, bu çok {adjective} idi.",
        "{time} {subject} neden {adjective} {object} {verb}, kimse bilmiyor.",
        "{place}, {time}, {subject} başka {object} {verb}.",
        "{subject} ve ötekiler {time} {adjective} {object} {verb}.",
        "hem {adjective} hem de değerli {object} {place} {subject} {verb}.",
    ),
    subjects=(
        *words("Ahmet Fatma Emre Deniz Burak Selin Kerem Nur dedem annem babam herkes birisi misafir"),
        *("genç kaptan", "yaşlı hâkim", "değirmenci", "dayım", "bir yabancı", "kraliçe", "memur", "kardeşim"),
    ),
    adjectives=words(
        "ucuz nadir sıcak karanlık akıllı temiz tatlı uygun tehlikeli yeşil yuvarlak faydalı acımasız kibar derin "
        "zengin uzun kısa serin mor"
    ),
    objects=words(
        "mumu taşı kaşığı yastığı eldiveni fıçıyı heykeli bileti düğmeyi tüyü bıçağı tekerleği kalemi haritayı çanı "
        "kurdeleyi çekmeceyi küreği iğneyi beşiği"
    ),
    verbs=words("sakladı açtı yaktı saydı izledi kırdı yıkadı buldu istedi kaybetti övdü getirdi bıraktı seçti"),
    places=(
        "mutfakta",
        "güvertede",
        "bulutların üzerinde",
        "sarayda",
        "duvarların arasında",
        "mağaranın içinde",
        "evden uzakta",
        "yol boyunca",
        "ateşin başında",
        "tiyatroda",
    ),
    times=(
        "dün",
        "şafakta",
        "ilkbaharda",
        "savaş sırasında",
        "haftada bir",
        "yemekten sonra",
        "çok önceleri",
        "pazar günü",
        "kar yağarken",
        "bir süre",
    ),
    capital_i="İ",
)

TURKISH = Language(
    haystack=_TURKISH_HAYSTACK,
    asides=_TURKISH_ASIDES,
    who=words("Ayşe Mehmet Zeynep Mustafa Elif Hüseyin Gülay Çetin"),
    needles=(
        ("{who} için gizli kod {key} olarak seçildi.", "{who} için gizli kod nedir? {who} için gizli kod "),
        ("{who} tarafından seçilen parola: {key}.", "Parola hangisi? {who} tarafından seçilen parola: "),
        ("{who} hakkında bunu unutma: cevap {key}.", "Şimdi hatırla. {who} hakkında bunu unutma: cevap "),
        ("{who} adlı kişinin anahtarı {key}.", "{who} adlı kişinin anahtarını söyle. Anahtar "),
        ("{who} şu numarada oturuyor: {key}.", "{who} nerede oturuyor? Numarası "),
        ("Not et, {who} için rozet {key}.", "{who} hangi rozeti taşıyor? Rozet "),
    ),
    taught=(
        ("{who} ile ilgili {thing} {key}.", "{who} ile ilgili {thing} hangisi? {who} ile ilgili {thing} "),
        ("{who} adına kayıtlı {thing}: {key}.", "{who} adına kayıtlı {thing} nedir? "),
        ("{key}, {who} kişisinin {thing} bilgisidir.", "{who} kişisinin {thing} bilgisini söyle: "),
        ("{who} bize {thing} olarak {key} dedi.", "{who} bize {thing} olarak ne dedi? Şunu dedi: "),
        ("{thing} sorulunca {who} {key} diyor.", "{thing} sorulunca {who} ne diyor? "),
        ("{who}, {thing}: {key}.", "{who}, {thing}: "),
        ("Listede {who} yanında {thing} {key} yazıyor.", "Listede {who} yanında hangi {thing} yazıyor? "),
        ("{who} kendine {thing} olarak {key} almış.", "{who} kendine hangi {thing} almış? "),
        ("Deftere göre {who} ve {thing} eşleşmesi {key} oldu.", "Deftere göre {who} ve {thing} eşleşmesi ne oldu? "),
        ("{who} artık {thing} yerine {key} kullanıyor.", "{who} artık {thing} yerine ne kullanıyor? "),
    ),
    things=(
        *words("oda bilet koltuk dolap telefon sokak dosya lakap otobüs tren madalya zil takım ödül işaret soyadı"),
        *("oda numarası", "sevdiği kelime", "giriş kodu", "banka hesabı", "uçuş numarası", "kullanıcı adı", "pin kodu"),
        *("doğum yılı", "ikinci parola", "sipariş numarası", "memleket", "uğurlu sayı", "kütüphane kartı"),
    ),
    held_out=(
        ("{who} kasasını {key} ile açıyor.", "{who} kasasını ne ile açıyor? {who} kasasını "),
        ("{who} için sihirli söz {key}.", "{who} için sihirli söz nedir? Sihirli söz "),
    ),
    keys=words(
        "elma kedi kuzu balo deve lale nane nota rota saat okul ordu uzay bina etek fare gemi inek kafa kova mavi "
        "moda pide sera vazo zeka yaka"
    ),
)

LANGUAGES = {"en": ENGLISH, "tr": TURKISH}
