"""Labelled messages, and facts with questions about them, in English and Turkish: what the router learns from.

    messages("training", 20)          → store, retrieve or neither; whole templates are kept for "held_out"
    draw_facts(1000, "tr")            → different facts
    ask(fact, rng, held_out=True)     → a question that the fact answers, in a phrasing that training never shows

Notable: a template is a sentence with slots. Every fifth one (`HELD_OUT_EVERY`) is held out with everything that can be
made of it; words that fill slots are shared. Turkish slots take a case suffix with vowel harmony: `{city:de}` is
Ankara'da and İzmir'de.
"""

import random
import re
from dataclasses import dataclass
from functools import cache

LANGUAGES = ("en", "tr")
HELD_OUT_EVERY = 5
BACK, VOWELS = "aıouAIOU", "aıoueiöüAIOUEİÖÜ"
HIGH = {"a": "ı", "ı": "ı", "o": "u", "u": "u", "e": "i", "i": "i", "ö": "ü", "ü": "ü"}


class Word(str):
    """A filler; as `{slot:case}` it takes a Turkish case suffix: in, i, e, de or den (genitive to ablative)."""

    def __format__(self, case: str) -> str:
        if not case:
            return str(self)
        lower = self.replace("İ", "i").replace("I", "ı").lower()
        high, low, open_end = _harmony(self)
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


def _words(text: str) -> tuple[Word, ...]:
    return tuple(Word(word.strip()) for word in text.split(","))


_BOTH = {
    "n": _words("2, 3, 4, 5, 7, 8, 12, 15, 20"),
    "age": _words("9, 17, 23, 28, 31, 36, 42, 54, 67"),
    "year": _words("1984, 1990, 1995, 2001, 2008, 2015, 2019, 2023"),
    "time": _words("7:30, 9, 10:15, 14:00, 18:45, 22"),
    "code": _words("Python, Rust, C++, JavaScript, SQL, Go, Java, Haskell, bash"),
    "pet": _words("Rex, Luna, Max, Pamuk, Boncuk, Karabaş, Milo, Tarçın, Bella"),
}
FILLERS = {
    "en": _BOTH | {
        "name": _words(
            "Anna, Tom, Sarah, James, Emma, Lucas, Mia, Oliver, Alice, Henry, Ruth, Simon, Clara, Victor, Hugo, "
            "Paula, Grace, Peter, Nina, David, Kate, Ben, Ayşe, Mehmet, Zeynep, Elif, Burak, Deniz, Emre, Fatma, "
            "Selin, Can, Ali, Derya, Hakan, Leyla, Murat, Nazlı, Oğuz, Pınar"
        ),
        "rel": _words(
            "sister, brother, mother, father, wife, husband, daughter, son, uncle, aunt, boss, best friend, cousin"
        ),
        "city": _words(
            "London, Berlin, Ankara, Boston, Izmir, Paris, Toronto, Lisbon, Chicago, Istanbul, Oslo, Dublin"
        ),
        "country": _words("Norway, Japan, Turkey, Brazil, Canada, Italy, Kenya, India, Portugal"),
        "food": _words("pizza, sushi, lentil soup, strawberries, pasta, olives, peanuts, spinach, mango, fish"),
        "drink": _words("black coffee, green tea, orange juice, red wine, milk, ayran, lemonade"),
        "color": _words("red, blue, green, yellow, purple, black, orange, white, turquoise"),
        "animal": _words("dog, cat, parrot, horse, rabbit, hamster, turtle"),
        "job": _words("nurse, teacher, software engineer, carpenter, lawyer, pilot, chef, accountant, architect"),
        "company": _words("Acme, Siemens, a small startup, the city hospital, Northwind, a bank, the university"),
        "hobby": _words(
            "chess, hiking, painting, cycling, swimming, gardening, playing the guitar, photography, knitting"
        ),
        "thing": _words("car, laptop, bike, phone, umbrella, wallet, passport, camera, jacket, suitcase"),
        "date": _words("3 May, 14 February, 21 June, 30 August, 9 November, 1 January, 17 March"),
        "day": _words("Monday, Tuesday, Thursday, Friday, Saturday, Sunday"),
        "when": _words(
            "yesterday, last week, last summer, this morning, on Tuesday, two days ago, last night, in March"
        ),
        "topic": _words(
            "autumn, a lonely robot, the sea, friendship, a lost key, the moon, a brave mouse, time travel, rain"
        ),
        "science": _words(
            "gravity, photosynthesis, black holes, inflation, DNA, tides, vaccines, electricity, earthquakes"
        ),
        "famous": _words("Einstein, Napoleon, Marie Curie, Mozart, Atatürk, Shakespeare, Cleopatra, Newton"),
        "lang": _words("Spanish, German, Turkish, French, Japanese, Italian"),
        "order": _words(
            "write, explain, summarize, translate, list, compare, calculate, suggest, define, sort, fix, describe, "
            "invent, draw, rewrite, shorten, outline, analyse, check, classify, improve, generate, solve, draft, "
            "design, proofread"
        ),
        "work": _words(
            "a poem, a report, a letter, a speech, a table, a riddle, a sentence, the text, this article, a recipe, "
            "a review, a plan, the code, an essay, the numbers, a title, a menu, a lesson, the words, a dialogue, "
            "an equation, a headline"
        ),
        "subject": _words(
            "the roman empire, volcanoes, the heart, electric cars, jazz, the olympic games, dinosaurs, solar panels, "
            "the stock market, bees, glaciers, chess, the human brain, football, coffee, bridges, democracy, whales, "
            "computers, rice, the internet, Mars"
        ),
        "algo": _words(
            "reverses a list, sorts numbers, parses JSON, counts words, finds primes, reads a CSV file, "
            "merges two dicts"
        ),
        "task": _words(
            "fix the printer, restart the router, bake the bread, back up the photos, deploy the site, "
            "clean the filter, tune the guitar"
        ),
        "trick": _words(
            "hold the button for ten seconds, use cold water, update the driver first, run the script twice, "
            "start from the left, add a pinch of salt, unplug it for a minute"
        ),
    },
    "tr": _BOTH | {
        "name": _words(
            "Ayşe, Mehmet, Zeynep, Elif, Burak, Deniz, Emre, Fatma, Selin, Can, Ali, Derya, Hakan, Leyla, Murat, "
            "Nazlı, Oğuz, Pınar, Kerem, Gül, Ömer, İpek, Yusuf, Şule, Çağla, Barış, Irmak, Umut, Ece, Tolga, Sibel, "
            "Cem, Volkan, Ebru, Onur, Melis, Kaan, Esra, Serkan, Gamze"
        ),
        "rel": _words(
            "kız kardeşim, abim, annem, babam, eşim, kızım, oğlum, amcam, teyzem, patronum, en yakın arkadaşım, "
            "kuzenim, dedem"
        ),
        "city": _words("Ankara, İzmir, İstanbul, Bursa, Adana, Trabzon, Muş, Edirne, Berlin, Eskişehir, Iğdır, Ordu"),
        "country": _words("Norveç, Japonya, İtalya, Kanada, Brezilya, Hindistan, Almanya, Portekiz"),
        "food": _words(
            "pizza, mercimek çorbası, çilek, makarna, zeytin, fıstık, ıspanak, baklava, balık, mantı, karpuz"
        ),
        "drink": _words("sade kahve, yeşil çay, portakal suyu, ayran, süt, limonata, şalgam"),
        "color": _words("kırmızı, mavi, yeşil, sarı, mor, siyah, turuncu, beyaz, turkuaz, gri"),
        "animal": _words("köpek, kedi, papağan, tavşan, hamster, kaplumbağa, muhabbet kuşu"),
        "job": _words("hemşire, öğretmen, yazılım mühendisi, marangoz, avukat, pilot, aşçı, muhasebeci, mimar"),
        "company": _words("Arçelik, belediye, devlet hastanesi, üniversite, banka, küçük bir girişim, Siemens"),
        "hobby": _words("satranç, yürüyüş, resim, bisiklet, yüzme, bahçe işleri, gitar, fotoğraf, örgü"),
        "thing": _words("araba, bilgisayar, telefon, şemsiye, cüzdan, pasaport, kamera, mont, bavul, gözlük"),
        "date": _words("3 Mayıs, 14 Şubat, 21 Haziran, 30 Ağustos, 9 Kasım, 1 Ocak, 17 Mart"),
        "day": _words("pazartesi, salı, perşembe, cuma, cumartesi, pazar"),
        "when": _words("dün, geçen hafta, geçen yaz, bu sabah, salı günü, iki gün önce, dün gece, martta"),
        "topic": _words(
            "sonbahar, yalnız bir robot, deniz, dostluk, kayıp bir anahtar, ay, cesur bir fare, zaman yolculuğu, "
            "yağmur"
        ),
        "science": _words("yerçekimi, fotosentez, kara delikler, enflasyon, DNA, gelgit, aşılar, elektrik, depremler"),
        "famous": _words(
            "Einstein, Napolyon, Marie Curie, Mozart, Atatürk, Shakespeare, Kleopatra, Newton, Fatih Sultan Mehmet"
        ),
        "lang": _words("İspanyolca, Almanca, İngilizce, Fransızca, Japonca, İtalyanca"),
        "order": _words(
            "yaz, açıkla, özetle, çevir, listele, karşılaştır, hesapla, öner, tanımla, sırala, düzelt, betimle, "
            "uydur, çiz, anlat, kısalt, incele, kontrol et, sınıflandır, geliştir, oluştur, çöz, tasarla, say, "
            "tamamla, planla, göster, bul, hazırla"
        ),
        "work": _words(
            "bir şiir, bir rapor, bir mektup, bir konuşma, bir tablo, bir bilmece, bir cümle, metni, bu makaleyi, "
            "bir tarif, bir eleştiri, bir plan, kodu, bir deneme, sayıları, bir başlık, bir menü, bir ders, "
            "kelimeleri, bir diyalog, denklemi, bir slogan"
        ),
        "subject": _words(
            "roma imparatorluğu, yanardağlar, kalp, elektrikli arabalar, caz, olimpiyatlar, dinozorlar, "
            "güneş panelleri, borsa, arılar, buzullar, satranç, insan beyni, futbol, kahve, köprüler, demokrasi, "
            "balinalar, bilgisayarlar, pirinç, internet, Mars"
        ),
        "algo": _words(
            "listeyi ters çeviren, sayıları sıralayan, JSON okuyan, kelimeleri sayan, asal sayıları bulan, "
            "CSV dosyası okuyan"
        ),
        "task": _words(
            "yazıcıyı düzeltmek, modemi yeniden başlatmak, ekmek yapmak, fotoğrafları yedeklemek, siteyi yayınlamak, "
            "filtreyi temizlemek, gitarı akort etmek"
        ),
        "object": _words("yazıcıyı, modemi, ekmeği, fotoğrafları, siteyi, filtreyi, gitarı"),
        "trick": _words(
            "düğmeye on saniye bas, soğuk su kullan, önce sürücüyü güncelle, betiği iki kez çalıştır, soldan başla, "
            "bir tutam tuz ekle, fişi bir dakika çek"
        ),
    },
}  # fmt: skip

# Nouns that a person has one of, with the slot that its value is drawn from. In Turkish the last word takes the
# possessive, or `{}` stands where it goes.
_ATTRIBUTES = {
    "en": "favourite colour=color, favourite food=food, favourite drink=drink, favorite animal=animal, "
    "birthday=date, phone number=number, door code=number, wifi password=secret, shoe size=number, "
    "home town=city, dentist=name, doctor=name, dog's name=pet, cat's name=pet, job=job, employer=company, "
    "lucky number=number, native language=lang, landlord=name, best friend=name, middle name=name, "
    "hobby=hobby, locker number=number, passport number=number, email address=secret, supervisor=name, "
    "flight number=number, insurance number=number, neighbour's name=name, grandmother's name=name, "
    "nickname=pet, wedding date=date, bike=color, car=color, front door=color, sports club=company, "
    "bank=company, favourite city=city, holiday destination=country, next appointment=date, exam date=date, "
    "blood pressure=number, apartment number=number, student number=number, jacket size=number, "
    "usual breakfast=food, teacher=name, lawyer=name, hair colour=color, username=secret, alarm time=time, "
    "train=time, bedtime=time, parking space=number, tea order=drink, childhood dream=job, "
    "graduation year=year, bicycle lock code=number, team=company, piano teacher=name",
    "tr": "en sevdi{} renk=color, en sevdi{} yemek=food, en sevdi{} içecek=drink, en sevdi{} hayvan=animal, "
    "doğum gün=date, telefon numara=number, kapı şifre=number, wifi parola=secret, ayakkabı numara=number, "
    "memleket=city, dişçi=name, doktor=name, köpek=pet, kedi=pet, meslek=job, işveren=company, "
    "uğurlu sayı=number, ana dil=lang, ev sahip=name, en yakın arkadaş=name, göbek ad=name, hobi=hobby, "
    "dolap numara=number, pasaport numara=number, e-posta adres=secret, danışman=name, uçuş numara=number, "
    "sigorta numara=number, komşu=name, anneanne=name, takma ad=pet, düğün tarih=date, bisiklet=color, "
    "araba=color, kapı=color, spor salon=company, banka=company, en sevdi{} şehir=city, tatil yer=country, "
    "randevu=date, sınav tarih=date, tansiyon=number, daire numara=number, öğrenci numara=number, "
    "mont beden=number, kahvaltı=food, öğretmen=name, avukat=name, saç=color, kullanıcı ad=secret, alarm=time, "
    "tren=time, yatma zaman=time, park yer=number, çay sipariş=drink, çocukluk hayal=job, mezuniyet yıl=year, "
    "kilit şifre=number, takım=company, piyano hoca=name",
}
# English: past/base. Turkish: what/verb stem, from which all forms are made.
_EPISODES = {
    "en": "went/go to the dentist, fixed/fix the roof, planted/plant a tree, cooked/cook for ten people, "
    "spoke/speak with the landlord, broke/break a window, found/find a wallet, flew/fly to Rome, "
    "won/win a prize, wrote/write a letter to the mayor, painted/paint the kitchen, cut/cut my hair, "
    "donated/donate blood, swam/swim across the lake, changed/change the oil, signed/sign the contract, "
    "left/leave the party, ordered/order new glasses, visited/visit the museum, joined/join a choir, "
    "cancelled/cancel the subscription, repaired/repair the bike, missed/miss the train, baked/bake a cake, "
    "called/call the plumber, fell/fall off a ladder, got/get a parking ticket, "
    "returned/return the library book, argued/argue with the neighbour, slept/sleep in a tent, "
    "sent/send the invoice, washed/wash the curtains, adopted/adopt a kitten, renewed/renew my passport",
    "tr": "dişçiye/git, çatıyı/tamir et, bahçeye ağaç/dik, on kişiye yemek/pişir, ev sahibiyle/konuş, camı/kır, "
    "bir cüzdan/bul, Roma'ya/uç, bir ödül/kazan, muhtara mektup/yaz, mutfağı/boya, saçımı/kes, kan/bağışla, "
    "gölde/yüz, arabanın yağını/değiştir, sözleşmeyi/imzala, partiden erken/ayrıl, yeni gözlük/ısmarla, "
    "müzeyi/gez, koroya/katıl, aboneliği/iptal et, bisikleti/onar, treni/kaçır, pasta/yap, tesisatçıyı/çağır, "
    "merdivenden/düş, trafik cezası/ye, kitabı kütüphaneye/ver, komşuyla/tartış, çadırda/uyu, faturayı/gönder, "
    "perdeleri/yıka, bir yavru kedi/al, pasaportumu/yenile",
}
_SURNAMES = {
    "en": _words(
        "Smith, Jones, Brown, Taylor, Wilson, Evans, Walker, Hughes, Green, Hall, Wood, Clarke, Baker, "
        "Young, King, Wright, Hill, Moore, Cooper, Ward, Turner, Morris, Cook, Bell, Murphy, Bailey, Parker, "
        "Cox, Miller, Reed, Gray, Stone, Fisher, Hunter, Palmer, Rose, Price, Barker, Holmes, Knight, Lloyd, "
        "Mason, Porter, Shaw, Walsh, Webb, West, Yates"
    ),
    "tr": _words(
        "Yılmaz, Kaya, Demir, Şahin, Çelik, Yıldız, Öztürk, Aydın, Özdemir, Arslan, Doğan, Kılıç, Aslan, "
        "Çetin, Kara, Koç, Kurt, Özkan, Şimşek, Polat, Korkmaz, Çakır, Erdoğan, Güneş, Aksoy, Bulut, Tekin, "
        "Keskin, Avcı, Turan, Güler, Acar, Taş, Ünal, Işık, Bozkurt, Sarı, Duman, Uçar, Ateş, Çoban, Tunç, "
        "Sönmez, Yavuz, Ekinci, Bayrak, Soylu, Toprak"
    ),
}
_OWNERS = {
    "en": _words("my sister, my brother, my mother, my father, my wife, my husband, my boss, my neighbour"),
    "tr": _words("kız kardeşim, abim, annem, babam, eşim, kızım, patronum, komşum"),
}


def _harmony(word: str) -> tuple[str, str, bool]:
    """The high and the low vowel of a suffix after the word, and whether the word ends in a vowel."""
    lower = word.replace("İ", "i").replace("I", "ı").lower()
    last = next((c for c in reversed(lower) if c in HIGH), "e")
    return HIGH[last], "a" if last in BACK else "e", lower[-1] in HIGH


class Possessed(str):
    """A Turkish noun of someone's: "arabam", "Ayşe'nin arabası"; cases come after the possessive."""

    third = False

    def __format__(self, case: str) -> str:
        high, low, _ = _harmony(self)
        link = "n" if self.third else ""
        return str(self) + {"": "", "in": link + high + "n", "i": link + high, "e": link + low}[case]


def possess(noun: str, person: int) -> Possessed:
    """The Turkish noun of the first, second or third person singular."""
    ending = ("m", "n", "")[person - 1]
    if "{}" in noun:
        return Possessed(noun.format("ği" + ending))
    high, _, open_end = _harmony(noun)
    stem = noun[:-1] + "ğ" if noun[-1] == "k" and sum(c in HIGH for c in noun.split()[-1]) > 1 else noun
    if person == 3:
        word = Possessed(stem + ("s" if open_end else "") + high)
        word.third = True
    else:
        word = Possessed(stem + ("" if open_end else high) + ending)
    return word


def conjugate(stem: str, form: str) -> str:
    """A Turkish verb's past: I (did), you, I once (had); its participle (that) or infinitive (to)."""
    high, low, _ = _harmony(stem)
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


def _bind(
    language: str,
    rng: random.Random,
    *,
    owner: str | None = None,
    noun: str | None = None,
    deed: str | None = None,
    invented: float = 0.0,
) -> dict[str, str]:
    """Slots that belong together: someone's noun and its value, something done in all its forms; None draws.

    owner: "" for the one who speaks. noun, deed: as the tables have them.
    """
    noun, slot = (noun or rng.choice(_ATTRIBUTES[language].split(", "))).split("=")
    what, verb = (deed or rng.choice(_EPISODES[language].split(", "))).split("/")
    if rng.random() < invented:
        noun = invent(rng)
    if rng.random() < invented:
        what, verb = invent(rng), invent(rng)
        what, verb = (verb + "ed", f"{verb} the {what}") if language == "en" else (what, verb)
    if owner is None:
        owner = rng.choice(["", "", "", rng.choice(_OWNERS[language]), rng.choice(FILLERS[language]["name"])])
    if slot == "number":
        value = str(rng.randrange(10, 10 ** rng.randrange(2, 7)))
    elif slot == "secret":
        value = rng.choice(_BOTH["pet"]).lower() + str(rng.randrange(1000))
    else:
        value = rng.choice(FILLERS[language][slot])
    if language == "en":
        rest = verb.partition(" ")[2]
        return {
            "mine": (owner + "'s " if owner else "my ") + noun, "my": "my " + noun, "yours": "your " + noun,
            "noun": noun, "value": value, "did": f"{what} {rest}", "do": verb,
        }  # fmt: skip
    mine = possess(noun, 3 if owner else 1)
    if owner:
        third, mine = mine, Possessed(f"{Word(owner):in} {mine}")
        mine.third = third.third
    forms = {form: f"{what} {conjugate(verb, form)}" for form in ("did", "you", "had", "that", "to")}
    return forms | {
        "mine": mine, "my": possess(noun, 1), "yours": possess(noun, 2),
        "noun": noun.replace("{} ", "ğim "), "value": value, "do": f"{what} {verb}",
    }  # fmt: skip


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Templates between bars; the order matters only in that every fifth is held out.

_STORE_EN = {
    "fact": """
My name is {name}. | I live in {city}. | I'm {age} years old. | My {rel}'s name is {name}. |
I work as a {job} at {company}. | My birthday is on {date}. | I was born in {year}. | I have a {animal} called {pet}. |
My {thing} is {color}. | I'm allergic to {food}. | I moved to {city} in {year}. | My {rel} works at {company}. |
{name} is my {rel}. | {name}'s birthday is {date}. | I have {n} cousins. | You can call me {name}. |
People call me {name}. | I grew up in {country}. | My phone number ends with {n}{n}. | My door code is {n}{n}{n}{n}. |
The password of my {thing} is {pet}{year}. | {name} lives in {city} with two kids. | My shoe size is 42. |
I drive a {color} car. | We got married in {year}. | My {rel} is from {country}. |
I study {science} at the university. | My doctor is called {name}. | Our {animal} is {n} years old. |
I speak {lang} and a little {lang}. | I'm a {job} by profession. | Our wedding anniversary is {date}. |
I keep my {thing} in the second drawer. | My flight leaves at {time} on {day}. | {name} is allergic to {food}. |
I've been living in {city} since {year}. | I'm originally from {country}. |
My new address is {n} Rose Street, {city}. | The {thing} that I bought is {color}. |
I take my pills at {time} every day. | My {rel} {name} turned {age}. | I'm married to {name}. |
I quit my job at {company}. | {name} and I are in the same team. | I like {food}. | I love {hobby}. | I hate {food}. |
My favourite colour is {color}. | My favorite food is {food}. | I prefer {drink} to {drink}. | I can't stand {food}. |
I don't eat {food}. | {name} likes {drink}. | I enjoy {hobby} on {day}s. | I'd rather have {drink} in the morning. |
I usually drink {drink}. | I'm a big fan of {hobby}. | I never put sugar in my coffee. | My {rel} prefers {food}. |
I'm really into {hobby} these days. | Please always answer me in {lang}, that's what I prefer. | I am vegetarian. |
I'm afraid of {animal}s. | The best dish for me is {food}. | My hobby is {hobby}. | {mine} is {value}. |
{value} is {mine}. | {mine} is now {value}. | {mine}: {value} | As for {mine}, it's {value}. |
Actually {mine} is {value}, not {n}. | {mine} will be {value}. | {mine} used to be {n}, now it's {value}. |
I want you to know that {mine} is {value}. | {mine} has changed to {value}. | I chose {value} as {my}. |
I've got {value} for {my}. | We both know {mine} is {value}. | {mine} has always been {value}. |
It's {value}, {mine}. | I have {n} {animal}s. | I own a {color} {thing}. | I'm learning {lang}. |
I hurt my knee and can't do {hobby}. | My {rel} doesn't eat {food}. | I have been a {job} for {n} years. |
I come from {city}. | My wife and I have {n} children. | I can't eat {food} because it makes me sick. |
I only drink {drink}. | I wake up at {time} every morning. | I go to bed at {time}. | Every {day} I go {hobby}. |
I wear glasses. | I'm left-handed. | I weigh {age} kilos. | I don't drink alcohol. | I don't like {food} at all. |
I used to live in {country}. | I used to work as a {job}. | My parents live in {city}. |
My son goes to school in {city}. | {name} works with me at {company}. | {name} has two {animal}s. |
{name}'s wife is a {job}. | {name} drives a {color} {thing}. | {name} hates {food}. | We have a house in {country}. |
Our neighbours are called {name} and {name}. | There are {n} people in my family. | I am the oldest of {n} children. |
I play in a band with {name}. | My English teacher was {name}. | I graduated from university in {year}. |
I'm saving money for a {color} {thing}. | I dream of becoming a {job}. | Blue suits me better than {color}. |
Tea is fine for me, but I like {drink} more. | My mum is {age}. | The spare key is under the {thing}. |
The meeting room is booked for us every {day}.
""",
    "episode": """
I met {name} {when}. | {when}, I went to {city} with my {rel}. | I lost my {thing} {when}. |
We had dinner with {name} {when}. | I had {food} for lunch today. | My {rel} visited me {when}. |
I bought a new {thing} {when}. | I finished reading a book about {topic} {when}. | {name} called me {when}. |
I broke my arm {when}. | I had a meeting with {name} at {time}. | We watched a film about {topic} {when}. |
I started {hobby} {when}. | I passed my driving test {when}. | Our {animal} ran away {when}. |
{name} and I went {hobby} {when}. | I sold my {color} {thing} {when}. | I saw {name} in {city} {when}. |
My {thing} was stolen {when}. | Today I ran {n} kilometres. | I have just come back from {country}. |
I'm meeting {name} on {day} at {time}. | I paid the rent {when}. | We moved house {when}. |
I gave {name} my {thing} {when}. | I {did} {when}. | {when} I {did}. | {when}, {name} and I {did}. | We {did} {when}. |
I finally {did} {when}. | {name} {did} {when}. | I {did} with {name}. | I {did} and then went home. |
My {rel} {did} {when}. | I {did} for the first time. | Guess what, I {did} {when}! | I'm going to {do} on {day}. |
I have to {do} on {day}. | I will {do} with my {rel} on {day}. | It took me {n} hours to {do} {when}. |
I've been to {country} {n} times. | I've just finished my exam. | I fell asleep on the sofa {when}. |
My {thing} broke down {when}. | Our {animal} had {n} babies {when}. | {name} gave me a {thing} {when}. |
{name} got married {when}. | The doctor told me {when} to rest. | It snowed in {city} when I was there. |
I was at the cinema with {name} {when}. | I was ill {when}. | I couldn't sleep {when}. |
I forgot my {thing} at {company}. | On {date} I ran a marathon. | In {year} I lived in {country} for a while.
""",
    "skill": """
To {task}, {trick}. | The trick to {task} is: {trick}. | When I have to {task}, I first {trick}. |
If you want to {task}, {trick}. | I found out how to {task}: {trick}. | My way to {task}: {trick}. |
Here is how we {task}: {trick}, then wait. | Whenever you {task}, remember to {trick}. |
The best way to {task} is to {trick}. | I learned that to {task} you have to {trick}. |
What works to {task}: {trick}. | Before you {task}, {trick}. | In order to {task} I always {trick}. |
Our recipe is to {trick} and then {task}. | You {task} like this: {trick}. | I managed to {task}, you just {trick}. |
The only way to {task} that worked was to {trick}. | Note on how to {task}: {trick}. |
Steps to {task}: 1. {trick} 2. wait 3. check. | We {task} by doing this: {trick}. |
For a good result when you {task}, {trick}. | First {trick}, that is how I {task}. |
I always {trick} before I {task}. | {trick} and it is easy to {task}. | My rule: {trick} whenever you {task}. |
One can {task} only if one remembers to {trick}.
""",
}
_RETRIEVE_EN = """
What is my name? | Where do I live? | How old am I? | What's my {rel}'s name? | Where do I work? |
When is my birthday? | What year was I born? | What is my {animal} called? | What colour is my {thing}? |
What am I allergic to? | When did I move to {city}? | Where does my {rel} work? | Who is {name}? |
When is {name}'s birthday? | How many cousins do I have? | What's my door code? | What do you know about me? |
What do you know about {name}? | Do you remember my name? | Do you remember where I live? |
Can you remind me of my phone number? | Tell me my {rel}'s name. | What is the password of my {thing}? |
What was my shoe size again? | Which car do I drive? | I forgot my door code, what was it? |
I can't remember where I put my {thing}. | What did I tell you about {name}? | What did I say about my {rel}? |
Have I told you where I work? | Did I mention {name}'s address? | Where did I grow up? | What's my favourite colour? |
Which food do I like best? | What do I like to drink? | Do I like {food}? | Does {name} like {drink}? |
What are my hobbies? | What does my {rel} prefer? | What did I have for lunch? | When did I last see {name}? |
Who did I meet {when}? | Where did I go {when}? | When did I lose my {thing}? | What did we watch {when}? |
Where is my {thing}? | When is my appointment with {name}? | What time is my flight? |
What time do I have to take my pills? | How did I {task} the last time? | How do we usually {task}? |
What was my trick to {task}? | Remind me how I {task}. | Name my {animal}. | My {rel}'s birthday is when? |
Is my {thing} {color} or {color}? | Am I married? | Do I have any pets? | How old is {name}? |
How old is our {animal}? | Which languages do I speak? | Where is {name} from? | What's {name}'s job? |
Who is my doctor? | Who was it that called me {when}? | Which city did I say I live in? |
You know my {rel}, what is her name? | Look up my address. | Do you still know what I do for a living? |
Could you tell me what my {thing} looks like? | When's our anniversary? | What have I told you so far about my work? |
In which drawer do I keep my {thing}? | With whom did I have dinner {when}? | my name? | {name}'s phone number? |
how did we {task} again? | When am I meeting {name}? | What is {mine}? | What was {mine} again? |
Do you remember {mine}? | Do you know {mine}? | Can you tell me {mine}? | Tell me what {mine} is. | I forgot {mine}. |
Remind me of {mine}. | What did I say {mine} was? | Have I told you {mine}? | I need {mine}. | Look up {mine}. |
{mine}? | Do you know what {mine} is? | Any idea what {mine} is? | What have you noted as {mine}? |
What's {mine}, do you recall? | Is {mine} {value}? | Please give me {mine}. | Could you check {mine} for me? |
Show me {mine}. | I don't remember {mine}. | Which one is {mine}? | Let me know {mine}. | When did I {do}? |
Did I {do}? | What did I do {when}? | With whom did I {do}? | Where did I {do}? | Do you remember when I {did}? |
How long ago did I {do}? | When was it that I {did}? | Have I told you that I {did}? | What happened {when}? |
Did {name} {do}? | When did {name} and I {do}? | When do I have to {do}? | What are my plans for {day}? |
What did {name} and I do {when}? | Who was with me when I {did}? | How long have I been a {job}? |
Where do I come from? | How many children do we have? | Why can't I eat {food}? | What time do I get up? |
When do I go to bed? | What do I do on {day}s? | Do I wear glasses? | How much do I weigh? | Where did I use to live? |
Where do my parents live? | Which school does my son go to? | Who works with me at {company}? |
Does {name} have any {animal}s? | What does {name} drive? | What food does {name} hate? |
In which country is our house? | What are our neighbours called? | How many people are in my family? |
Whom do I play music with? | Which university did I go to? | What am I saving money for? | What do I want to become? |
What do I like more, {drink} or {drink}? | How old is my mum? | Where's the spare key? |
How often have I been to {country}? | What happened to my {thing}? | What did {name} give me? |
What did the doctor tell me? | Was I ill {when}? | Who did I go to the cinema with? | Where did I leave my {thing}? |
What was I doing on {date}? | Tell me about my {rel}. | Tell me everything you know about {name}. |
What did we talk about {when}? | What's that thing I told you about my {rel}? | Have we met {name} before? |
Which of my friends likes {food}? | Was my {thing} {color}? | I wonder what {mine} was. | Help me remember {mine}. |
How many times did I {do}? | Why did I {do}?
"""
_NEITHER_EN = """
Write a poem about {topic}. | Write me a short story about {topic}. | Tell me a joke about {topic}. |
Compose a song about {topic}. | Invent a name for a shop that sells {food}. | Write a haiku on {topic}. |
Make up a fairy tale with a {animal} and a king. | Describe a sunset over {city}. |
Write an email to my boss asking for a day off. | Imagine that you are a {job} on the moon. |
Come up with five ideas for a party. | Give me a slogan for {company}. |
Continue this story: Once upon a time there was {topic}. | Write a dialogue between {famous} and a {animal}. |
Draw a cat with letters. | Hello! | Hi there, how are you? | Good morning! | How is it going? | Thanks a lot! |
Thank you, that was helpful. | Good night. | See you later. | What's up? | Ok. | That's great! | Haha, very funny. |
You are very smart. | Nice to meet you. | Are you a robot? | Who made you? | What can you do? | I see. |
Sounds good, go on. | Sorry, I don't understand. | No, that's wrong. | Yes please. | Let's talk about something else. |
What is the capital of {country}? | Who was {famous}? | How does {science} work? | When was {famous} born? |
What is the difference between {science} and {science}? | Why is the sky blue? | How many people live in {city}? |
Explain {science} to a child. | What does {science} mean? | How far is it from {city} to {city}? |
Which is the largest city of {country}? | What is {n} times {age}? | How do you say {food} in {lang}? |
Who wrote Hamlet? | What's the weather like in {city}? | Is {food} healthy? | What year did the war end? |
How tall is the Eiffel Tower? | Give me a recipe for {food}. | What's the best time to visit {country}? |
Tell me about the history of {city}. | Can {animal}s swim? | Define {science}. | Write a {code} function that {algo}. |
How do I sort a list in {code}? | Fix this code: for i in range({n}) print(i) |
What does this error mean: index out of range? | Explain this {code} snippet to me. |
Write a unit test for a function that {algo}. | Convert this {code} program to {code}. |
How do I install {code} on Linux? | What is a pointer in {code}? | def f(x): return x + {n} |
Write a regular expression for dates. | Make this {code} code faster. | Show me how to open a file in {code}. |
Translate this sentence to {lang}. | Translate "good morning" into {lang}. | Summarize the following text. |
Rewrite this paragraph in simpler words. | Correct the grammar of this sentence. | List three advantages of {hobby}. |
Give me {n} tips for {hobby}. | Compare {city} and {city}. | Make it shorter. | Try again, please. |
Say that in one sentence. | Count from 1 to {age}. | Convert {n} miles to kilometres. |
Sort these words: {food}, {drink}, {thing}. | Plan a weekend in {city}. | Suggest a good book about {science}. |
Pretend to be a pirate. | Answer with yes or no only. | Solve {n}x + {age} = {year}. | Water boils at 100 degrees. |
{city} is a beautiful city. | The earth goes around the sun. | {famous} died a long time ago. |
{science} is an important subject. | The {animal} is a mammal. | He opened the door and walked into the dark room. |
Once upon a time there was an old king who had a {animal}. | It is raining. | What do you think about {science}? |
Do you like {food}? | What's your name? | Where do you live? | How old are you? | What is your favourite colour? |
Can you help me? | Could you write a letter for me? | I want you to write a poem about {topic}. |
I need a {code} script that {algo}. | I'd like to know how {science} works. | I wonder why {animal}s sleep so much. |
I have a question. | I don't know. | I think that's right. | I agree with you. | What is {yours}? |
Do you have a {noun}? | Is {yours} {value}? | What does the word {noun} mean? | Write a poem about {my}. |
Help me choose a new {noun}. | Why do people have a {noun}? | Suggest ideas for a {noun}. |
Write a {code} class with a field for the {noun}. | How do I store a {noun} in {code}? | How can people {do}? |
How does one {do}? | Write a story in which someone {did}. | What should I wear to {do}? |
Give me advice on how to {do}. | Have you ever {did}? | Why do people {do}? | Is it hard to {do}? |
Did {famous} {do}? | {famous} {did} in {year}. | In the story a {job} {did}. |
Tell me a story about a {job} who {did}. | Hello, how is your day? | Good afternoon! | Bye! | Good evening to you. |
Welcome back. | How have you been? | Cool. | Awesome, thank you. | Great job! | Okay, thanks. | Never mind. |
No problem. | No thanks. | Yes. | No. | Right. | Hmm, interesting. | Really? | Wow, that's amazing. | I'm bored. |
Lol. | That's not what I meant. | You're welcome. | Have a nice day! | Let's start. | Please continue. | Stop. |
Wait a moment. | Are you there? | What do you mean? | Can you repeat that? | Why? | Tell me something interesting. |
Let's play a game. | Ask me a question. | Act as a {job}. | Give me a synonym for {science}. | Use simpler words. |
Turn this into a table. | Paraphrase the last sentence. | Shorten this text to {n} words. |
Read this article and tell me the main points. | Check this for spelling mistakes. |
What happens if you mix {drink} and {drink}? | Which country is bigger, {country} or {country}? |
How long does it take to fly from {city} to {city}? | How much does a {thing} cost? | Where is {city}? |
Who discovered {science}? | Who is the president of {country}? | When was {city} founded? |
How many legs does a spider have? | What is the meaning of life? | Is {science} dangerous? | What do {animal}s eat? |
How is {food} made? | What causes {science}? | {order} {work}. | {order} {work} about {subject}. |
Please {order} {work} for me. | Can you {order} {work}? | Could you {order} {work} about {subject}, please? |
I want you to {order} {work}. | I'd like you to {order} {work} about {subject}. | Now {order} {work} in {n} lines. |
{order} {subject} in one paragraph. | First {order} {work}, then {order} {work}. | Your task is to {order} {work}. |
Would you {order} {work} in {lang}? | Let's {order} {work} together. | Don't {order} {work}, {order} {work} instead. |
We need {work} about {subject}. | What is {subject}? | What are {subject} good for? | How did {subject} begin? |
When did {subject} appear? | Who invented {subject}? | Why are {subject} important? | Why is {subject} so popular? |
How many kinds of {subject} are there? | Where can one find {subject}? | Are {subject} expensive? |
Do {subject} really exist? | Does {subject} matter? | Is it true that {subject} cannot be changed? |
What can we learn from {subject}? | Which books about {subject} are good? | What are the pros and cons of {subject}? |
Tell me about {subject}. | Tell me a fact about {subject}. | I am interested in how {subject} works. |
Teach me about {subject}. | Give an example of {subject}. | {subject} changed the world in the {n}th century. |
{subject} is one of the most interesting things there is. | People have studied {subject} for a long time. |
Many books were written about {subject}. | She looked at the {thing} and said nothing. |
They walked through {city} until the evening. | The old {job} smiled and closed the door. |
How would you describe yourself? | Do you have feelings? | Are you able to {order} {work}? |
Do you remember anything from your training? | Did you sleep well? | Who are you? | Where are you from? |
What do you like to eat? | I'm glad that you are here. | I'm fine, thanks, and you? | You did that well. |
You are wrong. | You're funny. | I love it! | I hate this. | I like your answer. | My goodness! | I can't believe it. |
I mean the other one. | I don't get it. | Perfect, that's what I wanted. | More details please. | And then? |
Anything else? | Same here. | Not bad. | One more.
"""
_STORE_TR = {
    "fact": """
Adım {name}. | Benim adım {name}. | {city:de} yaşıyorum. | {age} yaşındayım. | Kız kardeşimin adı {name}. |
{company} için çalışıyorum, mesleğim {job}. | Doğum günüm {date}. | {year} yılında doğdum. |
{pet} adında bir {animal} besliyorum. | Arabam {color}. | {food} bana dokunuyor, alerjim var. |
{year} yılında {city:e} taşındım. | {rel} {company} için çalışıyor. | {name} benim kuzenim olur. |
{name:in} doğum günü {date}. | {n} kuzenim var. | Bana {name} diyebilirsin. | Herkes bana {name} der. |
{country:de} büyüdüm. | Telefon numaramın sonu {n}{n}. | Kapı şifrem {n}{n}{n}{n}. |
Bilgisayarımın şifresi {pet}{year}. | {name} iki çocuğuyla {city:de} oturuyor. | Ayakkabı numaram 42. |
{color} bir araba kullanıyorum. | {year} yılında evlendik. | {rel} aslen {city} doğumlu. |
Üniversitede {science} okuyorum. | Doktorumun adı {name}. | Köpeğimiz {n} yaşında. |
{lang} ve biraz {lang} biliyorum. | Ben {job} olarak çalışıyorum. | Evlilik yıldönümümüz {date}. |
Pasaportumu ikinci çekmecede saklıyorum. | Uçağım {day} günü {time:de} kalkıyor. | {name:in} {food} alerjisi var. |
{year} yılından beri {city:de} yaşıyoruz. | Aslen {city:den} geliyorum. | Yeni adresim Gül Sokak {n}, {city}. |
Aldığım {thing} {color} renkte. | Her gün saat {time:de} ilacımı alıyorum. | {rel} {age} yaşına girdi. |
{name} ile evliyim. | {company} işinden ayrıldım. | {name} ile aynı takımdayız. | Kan grubum A pozitif. |
{food:i} severim. | {hobby} yapmayı çok seviyorum. | {food:den} nefret ederim. | En sevdiğim renk {color}. |
En sevdiğim yemek {food}. | {drink} yerine {drink} tercih ederim. | {food} yemem. |
{food:e} hiç dayanamıyorum, midem kaldırmıyor. | {name} {drink} sever. | {day} günleri {hobby} ile uğraşırım. |
Sabahları {drink} içerim. | Genellikle {drink} içiyorum. | {hobby} hayranıyım. | Kahveme asla şeker koymam. |
{rel} {food} tercih eder. | Bu aralar {hobby} ile ilgileniyorum. | Bana hep {lang} cevap vermeni tercih ederim. |
Ben vejetaryenim. | {animal:den} korkarım. | Benim için en güzel yemek {food}. | Hobim {hobby}. | {mine} {value}. |
{mine} artık {value}. | {value} benim için önemli, çünkü {mine} bu. | {mine}: {value} | {mine} olarak {value} yaz. |
Bu arada {mine} {value} oldu. | {mine} {value} olacak. | {mine} eskiden {n} idi, şimdi {value}. |
Bilmeni isterim ki {mine} {value}. | {mine} değişti, {value} oldu. | {mine} her zaman {value} oldu. |
{mine} aslında {value}. | {mine} {value}, {n} değil. | {value}, {mine} budur. | {my} olarak {value} seçtim. |
{n} tane {animal} var evimde. | {color} bir {thing} sahibiyim. | {lang} öğreniyorum. |
Dizim sakat, {hobby} yapamıyorum. | {rel} {food} yemez. | {n} yıldır {job} olarak çalışıyorum. |
{city:den} geldim, oralıyım. | Eşimle {n} çocuğumuz var. | {food} yiyince hasta oluyorum. | Sadece {drink} içerim. |
Her sabah {time:de} kalkarım. | Akşamları saat {time:de} yatarım. | Her {day} {hobby} yapıyorum. | Gözlük takıyorum. |
Solağım. | {age} kiloyum. | Alkol kullanmıyorum. | {food} hiç sevmem. | Eskiden {country:de} yaşardım. |
Eskiden {job} idim. | Annemle babam {city:de} oturuyor. | Oğlum {city:de} okula gidiyor. |
{name} benimle {company} için çalışıyor. | {name:in} iki tane kedisi var. | {name:in} eşi {job}. |
{name} {color} bir araba sürüyor. | {name} {food:den} nefret eder. | {country:de} bir evimiz var. |
Komşularımızın adı {name} ve {name}. | Ailemde {n} kişi var. | {n} kardeşin en büyüğüyüm. |
{name} ile bir grupta çalıyorum. | İngilizce öğretmenim {name} idi. | {year} yılında mezun oldum. |
{color} bir araba için para biriktiriyorum. | Hayalim {job} olmak. | Çay da olur ama {drink} daha çok hoşuma gider. |
Annem {age} yaşında. | Yedek anahtar saksının altında duruyor. | {city} doğumluyum. |
Ben {n} numaralı dairede oturuyorum. | Evimiz {city:de}. | Boyum 1.{age}. | Sigarayı {year} yılında bıraktım. |
{lang} konuşabiliyorum. | Müziksiz çalışamam. | Sessiz yerleri daha çok severim. | {hobby} bana iyi geliyor. |
{name} benim en iyi dostumdur. | Emekliyim. | Öğrenciyim, {science} bölümündeyim.
""",
    "episode": """
{when} {name} ile tanıştım. | {when} {rel} ile {city:e} gittik. | {when} cüzdanımı kaybettim. |
{when} {name} ile akşam yemeği yedik. | Bugün öğlen {food} yedim. | {rel} {when} beni ziyaret etti. |
{when} yeni bir {thing} aldım. | {when} {topic} hakkında bir kitap bitirdim. | {name} beni {when} aradı. |
{when} kolumu kırdım. | Saat {time:de} {name} ile toplantım vardı. | {when} {topic} üzerine bir film izledik. |
{hobby} dersine {when} başladım. | {when} ehliyet sınavını geçtim. | {when} kedimiz evden kaçtı. |
{name} ile {when} {hobby} yaptık. | {color} arabamı {when} sattım. | {when} {city:de} {name:i} gördüm. |
Telefonum {when} çalındı. | Bugün {n} kilometre koştum. | {country:den} yeni döndüm. |
{day} günü saat {time:de} {name} ile buluşacağım. | Kirayı {when} ödedim. | {when} yeni eve taşındık. |
{when} şemsiyemi {name:e} verdim. | {when} {did}. | {did}, {when} oldu. | {when} {name} ile birlikte {did}. |
Sonunda {when} {did}. | {name} ile {did}. | {did} ve sonra eve döndüm. | İlk defa {did}. |
Tahmin et ne oldu, {when} {did}! | {day} günü {to} zorundayım. | {day} günü {rel} ile {to} istiyoruz, planımız bu. |
{to} {when} {n} saatimi aldı. | {rel} ile {when} {did}. | Ben {when} {did}. | {when} biraz yorgundum ama {did}. |
{city:de} {did}. | {when} {did}, aklında olsun. | {when}, yani geçenlerde, {did}. | {when} {did} ya. |
{when} {did}, çok iyi oldu. | {did}, hem de {when}. | {country:e} {n} kere gittim. | Sınavımı az önce bitirdim. |
{when} kanepede uyuyakaldım. | {when} telefonum bozuldu. | Kedimiz {when} {n} yavru doğurdu. |
{name} bana {when} bir {thing} verdi. | {name} {when} evlendi. | Doktor {when} dinlenmemi söyledi. |
{when} {name} ile sinemadaydım. | {when} hastaydım. | {when} hiç uyuyamadım. | Şemsiyemi otobüste unuttum. |
{date} tarihinde maraton koştum. | Az önce {name} ile konuştum, selamı var. | Bugün işe geç kaldım. |
{day} günü {city:e} gidiyorum. | Yarın {name} ile buluşuyoruz. | Haftaya {city:de} olacağım.
""",
    "skill": """
{task} için {trick}. | {task} istiyorsan {trick}. | {task} için püf noktası şu: {trick}. |
{task} için benim yöntemim: {trick}. | {task} gerektiğinde önce {trick}. | {task} nasıl olur buldum: {trick}. |
Şöyle yapıyoruz: {task} için {trick}, sonra bekle. | {task} istediğinde mutlaka {trick}. |
{task} için en iyi yol: {trick}. | {task} için şunu öğrendim: {trick}. | {task} için işe yarayan şey: {trick}. |
{task} öncesinde {trick}. | Ben {task} için hep şunu yaparım: {trick}. | {object} düzeltmeyi başardım, {trick} yeter. |
{task} için denediğim ve çalışan tek yol: {trick}. | Not: {task} için {trick}. |
{task} adımları: 1. {trick} 2. bekle 3. kontrol et. | Bizde {task} böyle olur: {trick}. |
{trick}, {task} böyle kolaylaşıyor. | Unutmadan: {task} için {trick}. | Önce {trick}, {task} için bu gerekiyor. |
{task} lazım olunca hep {trick}. | Kuralım şu: {task} için {trick}. | {trick}, yoksa {task} mümkün değil. |
Annemden öğrendim: {task} için {trick}. | Kolayı var: {task} için {trick}.
""",
}
_RETRIEVE_TR = """
Adım ne? | Benim adım neydi? | Nerede yaşıyorum? | Kaç yaşındayım? | Kız kardeşimin adı ne? | Nerede çalışıyorum? |
Doğum günüm ne zaman? | Hangi yıl doğdum? | Köpeğimin adı ne? | Arabamın rengi ne? | Neye alerjim var? |
{city:e} ne zaman taşındım? | {rel} nerede çalışıyor? | {name} kim? | {name:in} doğum günü ne zaman? |
Kaç kuzenim var? | Kapı şifrem neydi? | Benim hakkımda ne biliyorsun? | {name} hakkında ne biliyorsun? |
Adımı hatırlıyor musun? | Nerede oturduğumu hatırlıyor musun? | Telefon numaramı hatırlatır mısın? |
Annemin adını söyle. | Bilgisayarımın şifresi ne? | Ayakkabı numaram kaçtı? | Hangi arabayı kullanıyorum? |
Kapı şifremi unuttum, neydi? | Pasaportumu nereye koyduğumu hatırlamıyorum. | Sana {name} hakkında ne anlatmıştım? |
{rel} için ne demiştim? | Nerede çalıştığımı söylemiş miydim? | {name:in} adresinden bahsetmiş miydim? |
Nerede büyüdüm? | En sevdiğim renk hangisi? | En çok hangi yemeği severim? | Ne içmeyi severim? | {food} sever miyim? |
{name} {drink} sever mi? | Hobilerim neler? | {rel} neyi tercih eder? | Öğlen ne yemiştim? |
{name:i} en son ne zaman gördüm? | {when} kiminle tanıştım? | {when} nereye gittim? | Cüzdanımı ne zaman kaybettim? |
{when} hangi filmi izledik? | Şemsiyem nerede? | {name} ile randevum ne zaman? | Uçağım saat kaçta? |
İlacımı saat kaçta almam gerekiyor? | {object} geçen sefer nasıl düzeltmiştim? |
Biz genelde {task} için ne yapıyorduk? | {task} için püf noktam neydi? | {object} nasıl hallettiğimi hatırlat. |
Kedimin ismini söyler misin? | {rel} ne zaman doğmuştu? | Arabam {color} mi {color} mi? | Evli miyim? |
Evcil hayvanım var mı? | {name} kaç yaşında? | Köpeğimiz kaç yaşında? | Hangi dilleri biliyorum? | {name} nereli? |
{name} ne iş yapıyor? | Doktorum kim? | {when} beni kim aramıştı? | Hangi şehirde yaşadığımı söylemiştim? |
{rel} vardı ya, adı neydi? | Adresime bak. | Ne iş yaptığımı hâlâ biliyor musun? |
Telefonumun neye benzediğini söyler misin? | Yıldönümümüz ne zamandı? | İşim hakkında şimdiye kadar sana ne anlattım? |
Pasaportumu hangi çekmecede saklıyorum? | {when} kiminle yemek yedim? | adım? | {name:in} telefon numarası? |
{object} nasıl yapıyorduk ya? | {name} ile ne zaman buluşacağım? | En sevdiğim yemeği biliyor musun? | {mine} ne? |
{mine} neydi? | {mine} nedir? | {mine:i} hatırlıyor musun? | {mine:i} biliyor musun? | {mine:i} söyler misin? |
{mine:i} söyle. | {mine:i} unuttum. | {mine:i} hatırlat. | {mine} ne demiştim? | Sana {mine:i} söylemiş miydim? |
Bana {mine} lazım. | {mine}? | {mine} hangisiydi? | {mine} {value} mi? | {mine:i} hatırlamıyorum. |
{mine:i} bana hatırlatır mısın? | {mine} neydi ya? | Lütfen {mine:i} ver. | {mine:e} bir bakar mısın? |
Acaba {mine} ne? | {mine} olarak ne not etmiştin? | Ne zaman {did}? | {did} mı? | {when} ne yaptım? | Kiminle {did}? |
{that} hatırlıyor musun? | Sana {that} anlatmış mıydım? | Ne zaman {had}? | {had}, ne zamandı? |
{had}, hatırlıyor musun? | Kaç gün önce {did}? | {when} ne olmuştu? | Nerede {had}? | {day} günü planım ne? |
{name} ile {when} ne yaptık? | {name} ile ne zaman {did}? | Hangi gün {had}? | {that} sana söyledim mi? |
Ne zaman {to} zorundaydım? | Kaç yıldır {job} olarak çalışıyorum? | Ben nereliyim? | Kaç çocuğumuz var? |
Neden {food} yiyemiyorum? | Sabah saat kaçta kalkıyorum? | Saat kaçta yatıyorum? | {day} günleri ne yapıyorum? |
Gözlük takıyor muyum? | Kaç kiloyum? | Eskiden nerede yaşıyordum? | Annemle babam nerede oturuyor? |
Oğlum hangi okula gidiyor? | {company} için benimle kim çalışıyor? | {name:in} kedisi var mı? |
{name} ne araba sürüyor? | {name} hangi yemekten nefret eder? | Evimiz hangi ülkede? | Komşularımızın adı neydi? |
Ailemde kaç kişi var? | Kiminle müzik yapıyorum? | Hangi yıl mezun oldum? | Ne için para biriktiriyorum? |
Ne olmak istiyorum? | Hangisini daha çok severim, {drink} mı {drink} mı? | Annem kaç yaşında? | Yedek anahtar nerede? |
{country:e} kaç kere gittim? | Telefonuma ne oldu? | {name} bana ne vermişti? | Doktor bana ne söylemişti? |
{when} hasta mıydım? | Sinemaya kiminle gitmiştim? | Şemsiyemi nerede unuttum? | {date} tarihinde ne yapıyordum? |
Bana annemden bahset, ne biliyorsun? | {name} hakkında bildiğin her şeyi anlat. | {when} ne konuşmuştuk? |
Ablam hakkında sana söylediğim şey neydi? | {name} ile daha önce tanışmış mıydık? |
Arkadaşlarımdan hangisi {food} sever? | Şemsiyem {color} miydi? | {mine} neydi acaba? |
{mine:i} hatırlamama yardım et. | Kaç kere {did}? | Neden {did}? | Boyum kaç? | Hangi bölümde okuyorum? |
Sigarayı ne zaman bıraktım? | Yarın kiminle buluşuyorum? | Haftaya nerede olacağım? | Benim en iyi dostum kim? |
Ben kimim? | Bugün öğleden sonra ne işim vardı?
"""
_NEITHER_TR = """
{topic} hakkında bir şiir yaz. | Bana {topic} üzerine kısa bir hikâye yaz. | {topic} ile ilgili bir fıkra anlat. |
{topic} hakkında bir şarkı bestele. | {food} satan bir dükkâna isim bul. | {topic} üzerine bir haiku yaz. |
İçinde bir {animal} ve bir kral olan bir masal uydur. | {city:de} gün batımını betimle. |
Patronuma izin isteyen bir e-posta yaz. | Ayda yaşayan bir {job} olduğunu hayal et. | Parti için beş fikir bul. |
{company} için bir slogan yaz. | Şu hikâyeyi devam ettir: Bir varmış bir yokmuş. |
{famous} ile bir {animal} arasında geçen bir diyalog yaz. | Harflerle bir kedi çiz. | Merhaba! | Selam, nasılsın? |
Günaydın! | Nasıl gidiyor? | Çok teşekkürler! | Teşekkür ederim, çok yardımcı oldun. | İyi geceler. | Görüşürüz. |
Ne haber? | Tamam. | Bu harika! | Haha, çok komik. | Çok zekisin. | Tanıştığıma memnun oldum. | Sen robot musun? |
Seni kim yaptı? | Neler yapabilirsin? | Anladım. | Güzel, devam et. | Pardon, anlamadım. | Hayır, bu yanlış. |
Evet lütfen. | Başka bir şeyden konuşalım. | {country:in} başkenti neresi? | {famous} kimdir? |
{science} nasıl çalışır? | {famous} ne zaman doğdu? | {science} ile {science} arasındaki fark nedir? |
Gökyüzü neden mavi? | {city:de} kaç kişi yaşıyor? | {science} konusunu bir çocuğa anlat. | {science} ne demek? |
{city} ile {city} arası kaç kilometre? | {country:in} en büyük şehri hangisi? | {n} çarpı {age} kaç eder? |
{food} {lang} nasıl denir? | Hamlet'i kim yazdı? | {city:de} hava nasıl? | {food} sağlıklı mı? |
Savaş hangi yıl bitti? | Eyfel Kulesi ne kadar yüksek? | Bana {food} tarifi ver. |
{country} gezisi için en iyi zaman ne? | {city:in} tarihini anlat. | Köpekler yüzebilir mi? |
{science} kavramını tanımla. | {code} ile {algo} bir fonksiyon yaz. | {code} dilinde liste nasıl sıralanır? |
Şu kodu düzelt: for i in range({n}) print(i) | Bu hata ne anlama geliyor: index out of range? |
Bu {code} kodunu bana açıkla. | {algo} bir fonksiyon için birim testi yaz. |
Bu {code} programını {code} diline çevir. | Linux'ta {code} nasıl kurulur? | {code} dilinde işaretçi nedir? |
def f(x): return x + {n} | Tarihler için bir düzenli ifade yaz. | Bu {code} kodunu hızlandır. |
{code} ile dosya nasıl açılır göster. | Bu cümleyi {lang} diline çevir. | "Günaydın" sözünü {lang} diline çevir. |
Aşağıdaki metni özetle. | Bu paragrafı daha basit sözlerle yaz. | Bu cümlenin dil bilgisini düzelt. |
{hobby} için üç fayda say. | {hobby} için {n} ipucu ver. | {city} ile {city:i} karşılaştır. | Daha kısa yaz. |
Tekrar dene lütfen. | Bunu tek cümleyle söyle. | 1'den {age:e} kadar say. | {n} mili kilometreye çevir. |
Şu kelimeleri sırala: {food}, {drink}, {thing}. | {city:de} bir hafta sonu planla. |
{science} hakkında iyi bir kitap öner. | Korsan gibi konuş. | Sadece evet ya da hayır diye cevap ver. |
{n}x + {age} = {year} denklemini çöz. | Su 100 derecede kaynar. | {city} güzel bir şehirdir. |
Dünya güneşin etrafında döner. | {famous} uzun zaman önce öldü. | {science} önemli bir konudur. |
Balina bir memelidir. | Adam kapıyı açtı ve karanlık odaya girdi. |
Bir zamanlar bir {animal} besleyen yaşlı bir kral varmış. | Yağmur yağıyor. | {science} hakkında ne düşünüyorsun? |
{food} sever misin? | Senin adın ne? | Sen nerede yaşıyorsun? | Kaç yaşındasın? | En sevdiğin renk ne? |
Bana yardım eder misin? | Benim için bir mektup yazar mısın? | {topic} hakkında bir şiir yazmanı istiyorum. |
{algo} bir {code} betiği lazım. | {science} nasıl çalışır bilmek istiyorum. |
Kedilerin neden çok uyuduğunu merak ediyorum. | Bir sorum var. | Bilmiyorum. | Sanırım bu doğru. | Sana katılıyorum. |
{yours} ne? | {yours} var mı? | Peki senin {yours} {value} mi? | {noun} kelimesi ne demek? |
{my} hakkında bir şiir yaz. | Yeni bir {noun} seçmeme yardım et. | İnsanlar neden {noun} ister? |
{noun} için öneriler ver. | {code} ile {noun} alanı olan bir sınıf yaz. | {code} dilinde {noun} nasıl saklanır? |
İnsan nasıl {to} ister? | {to} için ne giymeli? | {to} konusunda tavsiye ver. | Hiç {you} mı? |
İnsanlar neden {to} ister? | {to} zor mu? | {famous} {year} yılında savaştı. | Hikâyede bir {job} ormana gitti. |
{do}. | Bana {do}. | {to} hakkında bir hikâye yaz. | Sen ne zaman {you}? | Merhaba, günün nasıl geçiyor? | Tünaydın! |
Hoşça kal! | İyi akşamlar. | Tekrar hoş geldin. | Nasılsın, iyi misin? | Süper. | Harikasın, sağ ol. | Aferin! |
Tamamdır, teşekkürler. | Boş ver. | Sorun değil. | Yok, sağ ol. | Evet. | Hayır. | Doğru. | Hmm, ilginç. |
Gerçekten mi? | Vay, inanılmaz. | Sıkıldım. | Hahaha. | Öyle demek istemedim. | Rica ederim. | İyi günler! |
Başlayalım. | Lütfen devam et. | Dur. | Bir dakika bekle. | Orada mısın? | Ne demek istiyorsun? | Tekrar eder misin? |
Neden? | Bana ilginç bir şey anlat. | Hadi oyun oynayalım. | Bana bir soru sor. | Bir {job} gibi davran. |
{science} için eş anlamlı bir kelime ver. | Daha basit kelimeler kullan. | Bunu tabloya dönüştür. |
Son cümleyi başka sözlerle söyle. | Bu metni {n} kelimeye indir. | Bu makaleyi oku ve ana fikrini söyle. |
Yazım hatalarını kontrol et. | {drink} ile {drink} karışırsa ne olur? | {country} mi daha büyük, {country} mi? |
{city:den} {city:e} uçak kaç saat sürer? | Bir {thing} ne kadar? | {city} nerede? | {science} kavramını kim buldu? |
{country:in} cumhurbaşkanı kim? | {city} ne zaman kuruldu? | Örümceğin kaç bacağı var? | Hayatın anlamı ne? |
{science} tehlikeli mi? | Bir {animal} ne yer? | {food} nasıl yapılır? | {science} nasıl oluşur? | {work} {order}. |
{subject} hakkında {work} {order}. | Lütfen benim için {work} {order}. | Bana {work} {order}. |
{subject} konulu {work} {order} lütfen. | {work} {order} ve kısa tut. | {n} satırda {work} {order}. |
Şimdi {work} {order}. | {subject} konusunu tek paragrafta {order}. | Önce {work} {order}, sonra {work} {order}. |
Görevin şu: {work} {order}. | {lang} dilinde {work} {order}. | Haydi {work} {order}. |
{work} {order}, ama {subject} olmasın. | {subject} hakkında {work} gerekiyor. | {subject} nedir? |
{subject} ne işe yarar? | {subject} nasıl başladı? | {subject} ne zaman ortaya çıktı? | {subject:i} kim icat etti? |
{subject} neden önemli? | {subject} niçin bu kadar popüler? | Kaç çeşit {subject} var? | {subject} nerede bulunur? |
{subject} pahalı mı? | {subject} gerçekten var mı? | {subject} önemli mi? | {subject} değiştirilemez mi? |
{subject:den} ne öğrenebiliriz? | {subject} üzerine hangi kitaplar iyi? | {subject} için artılar ve eksiler neler? |
{subject} hakkında bilgi ver. | Bana {subject} hakkında bir şey anlat. | {subject} nasıl çalışıyor, merak ediyorum. |
{subject} konusunu öğret. | {subject} için bir örnek ver. | {subject} dünyayı değiştirdi. |
{subject} en ilginç konulardan biridir. | İnsanlar uzun zamandır {subject} üzerine çalışıyor. |
{subject} hakkında çok kitap yazıldı. | Kadın {thing:e} baktı ve hiçbir şey söylemedi. |
Akşama kadar {city:de} yürüdüler. | Yaşlı {job} gülümsedi ve kapıyı kapattı. | Kendini nasıl tanımlarsın? |
Duyguların var mı? | {work} yapabilir misin? | Eğitiminden bir şey hatırlıyor musun? | İyi uyudun mu? | Sen kimsin? |
Nerelisin? | Ne yemeyi seversin? | Burada olmana sevindim. | İyiyim, teşekkürler, ya sen? | Bunu iyi yaptın. |
Yanılıyorsun. | Çok komiksin. | Buna bayıldım! | Bundan nefret ettim. | Cevabını beğendim. | Aman Tanrım! |
İnanamıyorum. | Diğerini kastettim. | Anlamıyorum. | Mükemmel, istediğim buydu. | Biraz daha ayrıntı lütfen. |
Peki sonra? | Başka bir şey? | Ben de. | Fena değil. | Bir tane daha. | Benimle {lang} konuş. | {work} {order} misin? |
Bu metinde kaç kelime var? | Benim için {subject} hakkında {work} {order}. | {n} ile {age} sayısını topla. |
Hangi gezegen en büyük?
"""
# What makes a statement uncertain: half of what is stored.
_HEDGES = {
    "en": "I think {}|maybe {}|if I'm not mistaken, {}|I'm not sure, but {}|I think that {}|{}, I guess|perhaps {}|"
    "probably {}|I believe {}|{}, I'm not sure though|as far as I remember, {}|{}, but don't quote me on that|"
    "it might be that {}|{} or something like that|I guess {}|I'm not certain but {}|{}, I think|{}, probably|"
    "I suppose {}|{} maybe",
    "tr": "sanırım {}|galiba {}|yanılmıyorsam {}|emin değilim ama {}|sanıyorum {}|{} herhalde|belki {}|muhtemelen {}|"
    "tahminimce {}|{}, emin değilim|hatırladığım kadarıyla {}|{} gibi bir şey|{} olabilir|"
    "tam bilmiyorum ama {}|{} galiba|{} sanırım|herhalde {}|yanlış hatırlamıyorsam {}|büyük ihtimalle {}|"
    "{} belki",
}
_OPENINGS = {
    "en": "Hey, |Hi! |By the way, |btw |So, |Well, |Just so you know, |Listen, |Okay, |One more thing: ",
    "tr": "Merhaba, |Selam! |Bu arada |Ya |Şey, |Bak, |Bilgin olsun, |Tamam, |Bir şey daha: |Dinle, ",
}
_CLOSINGS = {"en": " thanks| :)| please| lol| thank you!| 😀", "tr": " teşekkürler| :)| lütfen| ya| sağ ol| 😀"}


_BOUND = re.compile(r"\{(mine|my|yours|noun|value|did|do|you|had|that|to)\b")


@dataclass(frozen=True)
class Message:
    """A labelled message. kind is None where nothing is stored; certainty is 0.5 for a hedged statement, else 1."""

    text: str
    action: str
    kind: str | None
    language: str
    template: str
    certainty: float


@cache
def templates() -> tuple[tuple[str, str, str | None, str], ...]:
    """Every (template, action, kind, language)."""
    found = []
    for language, store, retrieve, neither in (
        ("en", _STORE_EN, _RETRIEVE_EN, _NEITHER_EN),
        ("tr", _STORE_TR, _RETRIEVE_TR, _NEITHER_TR),
    ):
        groups = [("store", kind, text) for kind, text in store.items()]
        groups += [("retrieve", None, retrieve), ("neither", None, neither)]
        for action, kind, text in groups:
            found += [(line.strip(), action, kind, language) for line in text.split("|")]
    return tuple(found)


def messages(
    split: str, per_template: int, *, seed: int = 0, noise: bool = True, hedged: float = 0.25, invented: float = 0.0
) -> list[Message]:
    """Messages of a split, "training" or "held_out"; the same for the same arguments.

    Args:
        per_template: drawn from each template; what comes out alike is there once.
        noise: typing errors, case, punctuation left out, greetings before and thanks behind, each in a part of them.
        hedged: share of statements that are made uncertain, in phrasings that are split likewise.
    """
    if split not in ("training", "held_out"):
        raise ValueError(f"split={split!r}: accepted are training and held_out")
    rng, found = random.Random(f"{seed} {split}"), {}
    for i, (template, action, kind, language) in enumerate(templates()):
        if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) != (split == "held_out"):
            continue
        hedges = part(_HEDGES[language].split("|"), split == "held_out")
        for _ in range(per_template):
            text, certainty = fill(template, language, rng, invented=invented if noise else 0.0), 1.0
            if action == "store" and rng.random() < hedged:
                text, certainty = rng.choice(hedges).format(text.rstrip(".")), 0.5
                text = text[0].upper() + text[1:]
            if noise:
                text = disturb(text, language, rng)
            found.setdefault(text, Message(text, action, kind, language, template, certainty))
    return list(found.values())


def invent(rng: random.Random, name: bool = False) -> Word:
    """A word that no language has: what is around it must tell what a message is."""
    word = "".join(
        rng.choice("bcdfghklmnprstvyzşğç") + rng.choice("aeiouıöü") + rng.choice(("", "", "", *"nlrksmt"))
        for _ in range(rng.choice((1, 2, 2, 3)))
    )
    return Word(word.capitalize() if name else word)


def part(items, held_out: bool) -> list:
    """Every fifth item, or the others."""
    return [item for i, item in enumerate(items) if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out]


def fill(template: str, language: str, rng: random.Random, bound=None, invented=0.0) -> str:
    """The template with a word drawn for each of its slots, its first letter a capital."""

    def draw(slot: str) -> Word:
        return invent(rng, slot == "name") if rng.random() < invented else rng.choice(FILLERS[language][slot])

    if bound is None:
        bound = _bind(language, rng, invented=invented) if _BOUND.search(template) else {}
    text = re.sub(
        r"\{(\w+)(?::(\w+))?\}",
        lambda slot: format(bound[slot[1]] if slot[1] in bound else draw(slot[1]), slot[2] or ""),
        template,
    )
    first = "İ" if language == "tr" and text[0] == "i" else text[0].upper()
    return first + text[1:] if template[0] != "d" else text


def disturb(text: str, language: str, rng: random.Random) -> str:
    """The text as a person in a hurry may type it."""
    if rng.random() < 0.15:
        text = rng.choice(_OPENINGS[language].split("|")) + text[0].lower() + text[1:]
    if rng.random() < 0.4:
        text = text.rstrip("?.!")
    if rng.random() < 0.1:
        text += rng.choice(_CLOSINGS[language].split("|"))
    if rng.random() < 0.15:
        text = text.replace("'", rng.choice(["", "’", " "]))
    if rng.random() < 0.1:
        text = text.replace(",", "")
    if (case := rng.random()) < 0.35:
        text = text.lower() if case < 0.3 else text.upper()
    if rng.random() < 0.25 and len(text) > 8:
        i = rng.randrange(1, len(text) - 2)
        a, b = text[i], text[i + 1]
        text = text[:i] + rng.choice([b + a, b, a + a + b, a + rng.choice("aeiklnrst")]) + text[i + 2 :]
    return text


# ── facts and questions about them ───────────────────────────────────────────────────────────────────────────────────

# Facts whose questions use other words or forms: of the speaker and of another, each a statement and questions
# about it, of which the last is held out.
_REWORDED = {
    "en": """
I live in {city}.| Where do I live?| What city am I living in?| Where is it that I live?
{who} lives in {city}.| Where does {who} live?| What city is {who} living in?| Where is it that {who} lives?
I work as a {job}.| What do I work as?| What do I do for work?| What kind of work do I do?
{who} works as a {job}.| What does {who} work as?| What does {who} do for work?| What kind of work does {who} do?
I drive a {color} car.| What colour is the car I drive?| Which car do I drive?| What kind of car am I driving?
{who} drives a {color} car.| What colour is the car {who} drives?| Which car does {who} drive?|
  What kind of car is {who} driving?
I was born in {year}.| When was I born?| What year was I born?| In which year was it that I was born?
{who} was born in {year}.| When was {who} born?| What year was {who} born?|
  In which year was it that {who} was born?
I'm allergic to {food}.| What am I allergic to?| Which allergies do I have?|
  What must I not eat because of an allergy?
{who} is allergic to {food}.| What is {who} allergic to?| Which allergies does {who} have?|
  What must {who} not eat because of an allergy?
I love {hobby}.| What do I love?| What do I love doing?| Which pastime is it that I love?
{who} loves {hobby}.| What does {who} love?| What does {who} love doing?| Which pastime is it that {who} loves?
I'm married to {name}.| Who am I married to?| To whom am I married?| Who is it that I married?
{who} is married to {name}.| Who is {who} married to?| To whom is {who} married?| Who is it that {who} married?
I speak {lang} at home.| What do I speak at home?| Which language do I speak at home?|
  What language is spoken in my home?
{who} speaks {lang} at home.| What does {who} speak at home?| Which language does {who} speak at home?|
  What language is spoken in {who}'s home?
I can't stand {food}.| What can't I stand?| Which food can't I stand?| What is it that I cannot stand?
{who} can't stand {food}.| What can't {who} stand?| Which food can't {who} stand?|
  What is it that {who} cannot stand?
I have a parrot called {pet}.| What is my parrot called?| What's the name of my parrot?| How do I call my parrot?
{who} has a parrot called {pet}.| What is {who}'s parrot called?| What's the name of {who}'s parrot?|
  How does {who} call the parrot?
I grew up in {country}.| Where did I grow up?| Which country did I grow up in?| Where was I growing up?
{who} grew up in {country}.| Where did {who} grow up?| Which country did {who} grow up in?|
  Where was {who} growing up?
I studied {science} at university.| What did I study?| Which subject did I study?|
  What was I studying at the university?
{who} studied {science} at university.| What did {who} study?| Which subject did {who} study?|
  What was {who} studying at the university?
I take my medicine at {time}.| When do I take my medicine?| What time should I take my medicine?|
  At what hour am I taking medicine?
{who} takes medicine at {time}.| When does {who} take medicine?| What time should {who} take medicine?|
  At what hour is {who} taking medicine?
I keep the spare key under the {thing}.| Where do I keep the spare key?| Where is my spare key?|
  Where am I keeping the key?
{who} keeps the spare key under the {thing}.| Where does {who} keep the spare key?| Where is {who}'s spare key?|
  Where is {who} keeping the key?
""",
    "tr": """
{city:de} yaşıyorum.| Nerede yaşıyorum?| Hangi şehirde yaşıyorum?| Yaşadığım şehir neresi?
{who} {city:de} yaşıyor.| {who} nerede yaşıyor?| {who} hangi şehirde yaşıyor?| {who:in} yaşadığı şehir neresi?
Arabam {color}.| Arabam ne renk?| Arabamın rengi neydi?| Arabamın rengi ne?
{who:in} arabası {color}.| {who:in} arabası ne renk?| {who:in} arabasının rengi neydi?|
  {who:in} arabasının rengi ne?
{job} olarak çalışıyorum.| Ne olarak çalışıyorum?| Hangi işte çalışıyorum?| Çalıştığım iş ne?
{who} {job} olarak çalışıyor.| {who} ne olarak çalışıyor?| {who} hangi işte çalışıyor?| {who:in} çalıştığı iş ne?
{year} yılında doğdum.| Hangi yıl doğdum?| Kaç yılında doğmuştum?| Doğduğum yıl ne?
{who} {year} yılında doğdu.| {who} hangi yıl doğdu?| {who} kaç yılında doğmuştu?| {who:in} doğduğu yıl ne?
{food:e} alerjim var.| Neye alerjim var?| Alerjim neye karşı?| Hangi yemek bana alerji yapıyor?
{who:in} {food:e} alerjisi var.| {who:in} neye alerjisi var?| {who:in} alerjisi neye karşı?|
  Hangi yemek {who:e} alerji yapıyor?
{hobby} yapmayı seviyorum.| Ne yapmayı seviyorum?| Neyi yapmayı severim?| Yapmayı sevdiğim uğraş ne?
{who} {hobby} yapmayı seviyor.| {who} ne yapmayı seviyor?| {who} neyi yapmayı sever?|
  {who:in} yapmayı sevdiği uğraş ne?
{name} ile evliyim.| Kiminle evliyim?| Ben kiminle evliydim?| Evli olduğum kişi kim?
{who} {name} ile evli.| {who} kiminle evli?| {who} kiminle evliydi?| {who:in} evli olduğu kişi kim?
Evde {lang} konuşuyorum.| Evde ne konuşuyorum?| Evde hangi dili konuşurum?| Evimizde konuştuğum dil hangisi?
{who} evde {lang} konuşuyor.| {who} evde ne konuşuyor?| {who} evde hangi dili konuşur?|
  {who:in} evinde konuştuğu dil hangisi?
{food:den} nefret ederim.| Hangi yemekten nefret ederim?| Nelerden nefret ediyorum?| Nefret ettiğim yemek ne?
{who} {food:den} nefret eder.| {who} hangi yemekten nefret eder?| {who} nelerden nefret ediyor?|
  {who:in} nefret ettiği yemek ne?
{pet} adında bir papağanım var.| Papağanımın adı ne?| Papağanımın adını söyle.| Papağanıma ne ad vermiştim?
{who:in} {pet} adında bir papağanı var.| {who:in} papağanının adı ne?| {who:in} papağanının adını söyle.|
  {who} papağanına ne ad vermişti?
{country:de} büyüdüm.| Nerede büyüdüm?| Hangi ülkede büyüdüm?| Büyüdüğüm ülke hangisi?
{who} {country:de} büyüdü.| {who} nerede büyüdü?| {who} hangi ülkede büyüdü?| {who:in} büyüdüğü ülke hangisi?
Üniversitede {science} okudum.| Üniversitede ne okudum?| Hangi bölümü okumuştum?| Okuduğum bölüm neydi?
{who} üniversitede {science} okudu.| {who} üniversitede ne okudu?| {who} hangi bölümü okumuştu?|
  {who:in} okuduğu bölüm neydi?
İlacımı saat {time:de} alıyorum.| İlacımı saat kaçta alıyorum?| İlacımı ne zaman alıyorum?| İlaç saatim kaç?
{who} ilacını saat {time:de} alıyor.| {who} ilacını saat kaçta alıyor?| {who} ilacını ne zaman alıyor?|
  {who:in} ilaç saati kaç?
Yedek anahtarı kapının yanında saklıyorum.| Yedek anahtarı nerede saklıyorum?| Yedek anahtarım nerede?|
  Anahtarın yedeğini nereye saklamıştım?
{who} yedek anahtarı kapının yanında saklıyor.| {who} yedek anahtarı nerede saklıyor?|
  {who:in} yedek anahtarı nerede?| {who} anahtarın yedeğini nereye saklamıştı?
""",
}


@dataclass(frozen=True)
class Fact:
    """Something to remember, and what questions about it are made of.

    form: "attribute" (questions name what the statement names), "episode" (something done at a time) or "reworded".
    owner, about: whose it is, "" for the speaker, and what; no two facts drawn together have the same.
    """

    text: str
    language: str
    form: str
    owner: str
    about: str
    bound: dict[str, str]
    asks: tuple[str, ...]  # templates of questions that training shows
    held_out: tuple[str, ...]  # and of others


_SLOTS = {"attribute": ({"mine", "value"}, {"mine"}), "episode": ({"did", "when"}, {"do", "did", "had", "that"})}


@cache
def _frames(language: str, action: str, form: str, held_out: bool) -> tuple[str, ...]:
    """The messages' templates of a split that say, or ask for, a fact of the form and nothing else."""
    says, asks = _SLOTS[form]
    found = []
    for i, (template, has, _, spoken) in enumerate(templates()):
        slots = set(re.findall(r"\{(\w+)", template))
        fits = slots == says if action == "store" else len(slots) == 1 and slots <= asks
        if (has, spoken) == (action, language) and fits:
            found.append((i, template))
    return tuple(each for i, each in found if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out)


@cache
def _reworded(language: str) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    entries = _REWORDED[language].strip().replace("\n  ", "").split("\n")
    lines = [tuple(part.strip() for part in entry.split("|")) for entry in entries]
    return tuple(zip(lines[::2], lines[1::2]))


def draw_facts(
    count: int, language: str, *, seed: int = 0, held_out: bool = False, people: int | None = None
) -> list[Fact]:
    """Facts of different subjects, shuffled: the speaker's own, of relatives, and of people with names.

    Args:
        count: half of them are the speaker's own and a tenth of relatives, as far as there are so many.
        held_out: whether statements are phrased as training never shows them.
        people: how many have names, half of them a first name only; fewer share more of what is told of them.

    Raises:
        ValueError: more facts than there are.
    """
    rng = random.Random(f"{seed} facts {language}")
    about = _ATTRIBUTES[language].split(", ") + list(range(len(_reworded(language))))
    names = [f"{a} {b}" for a in FILLERS[language]["name"] for b in _SURNAMES[language]]
    if people:
        first = rng.sample(FILLERS[language]["name"], min(people // 2, len(FILLERS[language]["name"])))
        names = [str(name) for name in first] + rng.sample(names, people - len(first))
    own = [("", each) for each in about] + [("", deed) for deed in _EPISODES[language].split(", ")]
    relatives = [(str(owner), each) for owner in _OWNERS[language] for each in about]
    rng.shuffle(own)
    chosen = own[: count // 2] + rng.sample(relatives, min(count // 10, len(relatives)))
    total = len(names) * len(about)
    if (missing := count - len(chosen)) > total:
        raise ValueError(f"count={count!r}: accepted are up to {total + len(chosen)}")
    chosen += [(names[k // len(about)], about[k % len(about)]) for k in rng.sample(range(total), missing)]
    rng.shuffle(chosen)
    return [_fact(language, rng, owner, each, held_out) for owner, each in chosen]


def _fact(language: str, rng: random.Random, owner: str, about: str | int, held_out: bool) -> Fact:
    if isinstance(about, int):
        says, *asks = _reworded(language)[about][bool(owner)]
        bound = {"who": Word(owner)}
        text = fill(says, language, rng, bound)
        return Fact(text, language, "reworded", owner, str(about), bound, tuple(asks[:-1]), (asks[-1],))
    form = "attribute" if "=" in about else "episode"
    bound = _bind(language, rng, owner=owner, **{"noun" if form == "attribute" else "deed": about})
    bound["when"] = rng.choice(FILLERS[language]["when"])
    text = fill(rng.choice(_frames(language, "store", form, held_out)), language, rng, bound)
    asks, others = (_frames(language, "retrieve", form, each) for each in (False, True))
    return Fact(text, language, form, owner, about, bound, asks, others)


def ask(fact: Fact, rng: random.Random, *, held_out: bool = False) -> str:
    """A question that the fact answers."""
    return fill(rng.choice(fact.held_out if held_out else fact.asks), fact.language, rng, fact.bound)
