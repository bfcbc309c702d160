"""External memory: what is found, counted, forgotten and refused; several processes; processes killed while writing."""

import json
import math
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import time

import pytest

from model.sgm import memory as module
from model.sgm.facts import ask, draw_facts
from model.sgm.memory import BudgetExceeded, ExternalMemory
from model.sgm.memory_entry import MAX_TEXT
from model.sgm.memory_json import MAX_ACCESSES
from model.sgm.memory_text import search_words

DAY = 86_400.0


class Clock:
    def __init__(self, now=1_700_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def memory(tmp_path):
    with ExternalMemory(tmp_path / "folder" / "m.db", daily_budget=None, clock=Clock()) as made:
        yield made


def texts(matches):
    return [match.entry.text for match in matches]


def bm25(query, documents):
    """BM25 of FTS5 (k1 = 1.2, b = 0.75, idf at least 1e-6) over two columns: words, and their first four characters."""

    def columns(text):
        words = search_words(text)
        return [("w", word) for word in words] + [("s", word[:4]) for word in words]

    bags = [columns(text) for text in documents]
    mean = sum(map(len, bags)) / len(bags)
    scores = []
    for bag in bags:
        score = 0.0
        for term in dict.fromkeys(columns(query)):
            having = sum(term in other for other in bags)
            idf = max(math.log((len(bags) - having + 0.5) / (having + 0.5)), 1e-6)
            count = bag.count(term)
            score += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(bag) / mean))
        scores.append(score)
    return scores


def test_scores_and_order_are_those_of_bm25(memory):
    documents = [fact.text for fact in draw_facts(120, "tr", seed=3)] + ["Arabam kırmızı.", "😀 kedi 😀", "ok"]
    memory.remember_all(documents)
    for query in ("arabamın rengi ne?", "😀", "Ayşe'nin doğum günü ne zaman?", "kedi kedi KEDİ"):
        expected = dict(zip(documents, bm25(query, documents)))
        found = memory.retrieve(query, limit=500)
        assert {match.entry.text: match.score for match in found} == pytest.approx(
            {text: score for text, score in expected.items() if score > 0}, rel=1e-6
        )
        assert [m.score for m in found] == sorted((m.score for m in found), reverse=True)


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("Arabam kırmızı.", "arabamın rengi ne?"),
        ("IŞIKLI ŞİŞE İstanbul'da", "ISIKLI SISE istanbulda"),
        ("ışıklı", "IŞIKLI"),
        ("Ayşe'nin doğum günü 3 Mayıs", "ayse'nin dogum gunu"),
        ("I was living in Ankara", "Where do I live?"),
        ("ＦＵＬＬ ｗｉｄｔｈ ﬁne", "full fine"),
        ("the 🔪 is sharp", "🔪"),
        ("我喜欢茶", "茶"),
        ('quotes " and NEAR( * stay', 'near( " AND * OR'),
        ("a\x00b binary \x01\x7f", "binary"),
    ],
)
def test_it_finds(memory, text, query):
    memory.remember("something else entirely")
    memory.remember(text)
    assert texts(memory.retrieve(query))[:1] == [text]


def test_queries_without_words_find_nothing(memory):
    memory.remember("Merhaba")
    for query in ("", "  ?!", "\x00\x01", "…", '"', "xyzzy"):
        assert memory.retrieve(query) == []
    assert len(memory.retrieve("merhaba " * 50_000)) == 1


def test_newer_comes_first_among_equals_and_kinds_and_limit_hold(memory):
    for i in range(7):
        memory.remember(f"tea number {i}", "episode" if i % 2 else "fact")
    assert texts(memory.retrieve("tea", limit=3)) == [f"tea number {i}" for i in (6, 5, 4)]
    assert texts(memory.retrieve("tea", kinds=["episode"])) == [f"tea number {i}" for i in (5, 3, 1)]
    assert memory.retrieve("tea", kinds=[]) == []


def test_the_same_text_refreshes(memory):
    first = memory.remember("Kızım İPEK on yaşında", confidence=0.5)
    memory._clock.now += 100
    again = memory.remember("  kızım ipek  ON yaşında. ", confidence=0.25)
    assert (again.id, again.text, again.confidence, again.accesses) == (first.id, first.text, 0.5, 1)
    assert again.accessed == first.accessed + 100 and again.created == first.created and len(memory) == 1
    assert isinstance(memory.remember("kızım ipek on yaşında", confidence=1).confidence, float)
    others = [memory.remember("Kızım İPEK ön yaşında"), memory.remember("Kızım İPEK on yaşında", "episode")]
    assert len(memory) == 3 and len({first.id, *(other.id for other in others)}) == 3


def test_accesses_are_counted(memory):
    entry = memory.remember("tea")
    memory._clock.now += 5
    memory.retrieve("tea", touch=False)
    assert memory.list()[0] == entry
    memory.retrieve("tea")
    assert memory.list()[0].accesses == 1 and memory.list()[0].accessed == entry.accessed + 5


def test_budget_is_of_the_day_in_utc_and_shared(tmp_path):
    clock = Clock(20 * DAY - 1)
    with (
        ExternalMemory(tmp_path / "m.db", daily_budget=3, clock=clock) as one,
        ExternalMemory(tmp_path / "m.db", daily_budget=3, clock=clock) as two,
    ):
        for i, each in enumerate((one, two, one)):
            assert each.writes_left() == 3 - i
            each.remember(f"text {i}")
        with pytest.raises(BudgetExceeded, match="daily_budget=3: used up on 1970-01-20"):
            two.remember("a fourth")
        two.remember("TEXT 0")  # a refresh costs nothing
        assert one.forget(1).text == "text 0" and one.writes_left() == 0  # forgetting gives nothing back
        assert len(two) == 2
        clock.now += 2
        assert one.writes_left() == 3 and two.remember("a fourth").text == "a fourth" and one.writes_left() == 2
    with ExternalMemory(tmp_path / "m.db", daily_budget=0, clock=clock) as none, pytest.raises(BudgetExceeded):
        none.remember("no")
    with ExternalMemory(tmp_path / "m.db", daily_budget=None, clock=clock) as free:
        assert free.writes_left() is None and free.remember("yes")


def test_different_texts_are_different_entries(memory):
    for text in ("!!!", "...", "Kızın adı Sıla", "Kızın adı Sila"):
        memory.remember(text)
    assert len(memory) == 4 == len(set(memory.remember_all(["!!!", "...", "Kızın adı Sıla", "Kızın adı Sila"])))
    assert len(memory.retrieve("sıla")) == 2  # searching folds


def test_forgetting(memory):
    for text in ("Adım Ali", "Ali's name is short", "my name is Ali", "Köpeğim Rex", "At aldım", "atlas"):
        memory.remember(text)
    before = memory.list()
    for query in ("?!", "adı yok", "köpekçi", "ata", "Rexy", "ADIMI"):
        assert memory.forget_matching(query) == []
    assert [e.text for e in memory.forget_matching("ali name")] == ["Ali's name is short", "my name is Ali"]
    assert [e.text for e in memory.forget_matching("ali")] == ["Adım Ali", "Ali's name is short", "my name is Ali"]
    assert memory.list() == before  # where several match, none is gone
    assert [e.text for e in memory.forget_matching("ALİ short")] == ["Ali's name is short"]
    assert [e.text for e in memory.forget_matching("köpeğimi")] == ["Köpeğim Rex"]
    assert [e.text for e in memory.forget_matching("at")] == ["At aldım"]
    assert memory.forget_matching("ali " * 5000 + "yok") == []
    assert memory.forget(10**6) is None and memory.retrieve("short") == [] and memory.verify() == []
    last = memory.list(limit=1)[0]
    assert memory.forget(last.id) == last and memory.remember("new").id > last.id


def test_counts(memory):
    assert memory.counts() == {"fact": 0, "episode": 0, "skill": 0}
    for i in range(5):
        memory.remember(f"text {i}", "skill" if i else "fact")
    assert memory.counts() == {"fact": 1, "episode": 0, "skill": 4}


def test_list_pages_through_all(memory):
    for i in range(25):
        memory._clock.now += 1
        memory.remember(f"text {i}", "skill" if i < 5 else "fact")
    pages = [entry.text for offset in range(0, 30, 10) for entry in memory.list(limit=10, offset=offset)]
    assert pages == [f"text {i}" for i in reversed(range(25))] and len(memory.list("skill")) == 5
    memory.remember_all([f"more {i}" for i in range(100)])
    assert len(memory.list()) == 50 and len(memory.list(limit=None)) == 125
    assert len(memory.list("skill", limit=None, offset=2)) == 3


def test_export_and_import(memory, tmp_path):
    for text, kind in (("Arabam kırmızı 🚗", "fact"), ("line\nbreak \x00", "skill"), ("漢字", "episode")):
        memory.remember(text, kind, confidence=0.25, source="şaka")
    memory.retrieve("arabam")
    path = memory.export_json(tmp_path / "e.json")
    with ExternalMemory(tmp_path / "other.db", daily_budget=0) as other:
        assert other.import_json(path) == 3 and other.import_json(path) == 0
        assert other.list(limit=9) == memory.list(limit=9) and other.verify() == []
        assert texts(other.retrieve("arabamın")) == ["Arabam kırmızı 🚗"]
        original, data = path.read_bytes(), json.loads(path.read_text())
        data["entries"][0] |= {"confidence": 0.75, "created": 5.0, "accesses": 40}
        path.write_text(json.dumps(data))
        assert other.import_json(path) == 0
        merged = other.list("fact")[0]
        assert (merged.confidence, merged.created, merged.accesses) == (0.75, 5.0, 40)
        path.write_bytes(original)
        assert other.import_json(path) == 0 and other.list("fact") == [merged]


def test_an_export_never_replaces_the_memory(memory, tmp_path, monkeypatch):
    memory.remember("kept")
    folder = memory.path.parent
    router = folder / "m.db.router.safetensors"
    router.write_bytes(b"weights")
    (tmp_path / "link.db").symlink_to(memory.path)
    (tmp_path / "up").symlink_to(folder)
    with ExternalMemory(tmp_path / "link.db") as linked:
        monkeypatch.chdir(folder)
        own = [f"m.db{end}" for end in ("", "-wal", "-shm", "-journal", ".router.safetensors")]
        others = ["./m.db", "../folder/m.db-wal", tmp_path / "link.db", tmp_path / "up" / "m.db-shm"]
        for path in (*own, *others):
            for each in (memory, linked):
                with pytest.raises(ValueError, match=re.escape(f"path={os.fspath(path)!r}: of the memory itself; acc")):
                    each.export_json(path)
        with pytest.raises(ValueError, match="of the memory itself"):
            linked.export_json(tmp_path / "link.db.router.safetensors")
    # Opened by a relative path, and the folder changed since.
    with ExternalMemory("m.db") as relative:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="of the memory itself"):
            relative.export_json(memory.path)
        assert relative.export_json("m.db").read_text("utf-8").count("kept") == 1  # another folder's
    assert router.read_bytes() == b"weights" and memory.verify() == []
    assert texts(memory.retrieve("kept")) == ["kept"]


def test_an_export_that_cannot_be_written_is_one_line(memory, tmp_path):
    memory.remember("x")
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, "", tmp_path / "pipe", tmp_path / "file" / "x", tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises((ValueError, OSError), match=r"accepted is a file|null byte") as caught:
            memory.export_json(path)
        assert str(caught.value).startswith(f"path={os.fspath(path)!r}: ") and "\n" not in str(caught.value)


def test_counts_of_accesses_do_not_overflow(memory, tmp_path):
    memory.remember("x")
    path = memory.export_json(tmp_path / "e.json")
    data = json.loads(path.read_text())
    for count in (2**53, 2**63 - 1, 10**25):
        data["entries"][0]["accesses"] = count
        path.write_text(json.dumps(data))
        assert memory.import_json(path) == 0
        assert memory.list()[0].accesses == MAX_ACCESSES
    memory.touch(memory.list())
    memory.remember("x")
    assert memory.list()[0].accesses == MAX_ACCESSES + 2 and isinstance(memory.list()[0].accesses, int)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="x"), "no export"),
        (lambda d: d.update(version=9), "version 9"),
        (lambda d: d["entries"][1].update(kind="secret"), "entry 2: kind='secret'"),
        (lambda d: d["entries"][1].update(text=""), "entry 2: text=''"),
        (lambda d: d["entries"][1].update(text="\ud800"), "entry 2: text="),
        (lambda d: d["entries"][1].update(confidence=float("nan")), "entry 2: confidence=nan"),
        (lambda d: d["entries"][1].update(created="now"), "entry 2: created='now'"),
        (lambda d: d["entries"][1].update(accesses=-1), "entry 2: accesses=-1"),
        (lambda d: d["entries"][1].pop("id"), "entry 2: accepted is an object"),
        (lambda d: d["entries"].append(None), "entry 3: accepted is an object"),
    ],
)
def test_import_is_all_or_nothing(memory, tmp_path, change, message):
    for text in ("one", "two"):
        memory.remember(text)
    path = memory.export_json(tmp_path / "e.json")
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with ExternalMemory(tmp_path / "other.db") as other:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            other.import_json(path)
        assert "\n" not in str(caught.value) and len(other) == 0
        for content in (b"\xff\x00", b"[1]", b""):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="import"):
                other.import_json(path)
        with pytest.raises(ValueError, match="No such file"):
            other.import_json(tmp_path / "none.json")


def test_bad_arguments_are_one_line(memory, tmp_path):
    calls = {
        "text=''": lambda: memory.remember("  \n"),
        "accepted is a text of 1 to": lambda: memory.remember("x" * (MAX_TEXT + 1)),
        "text=b'x'": lambda: memory.remember(b"x"),
        "surrogate": lambda: memory.remember("a\udcff"),
        "kind='thing'": lambda: memory.remember("a", "thing"),
        "confidence=2": lambda: memory.remember("a", confidence=2),
        "confidence=nan": lambda: memory.remember("a", confidence=float("nan")),
        "limit=0": lambda: memory.retrieve("a", limit=0),
        "limit=True": lambda: memory.list(limit=True),
        "offset=-1": lambda: memory.list(offset=-1),
        "id='3'": lambda: memory.forget("3"),
        "kind='x'": lambda: memory.retrieve("a", kinds=["x"]),
        "daily_budget=-1": lambda: ExternalMemory(tmp_path / "n.db", daily_budget=-1),
        "a folder": lambda: ExternalMemory(tmp_path),
        "clock=inf": lambda: ExternalMemory(tmp_path / "n.db", clock=lambda: float("inf")).remember("a"),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert len(memory) == 0
    memory.remember("ş" * MAX_TEXT)
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        len(memory)


def test_other_files_are_refused_and_left_alone(tmp_path):
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    noise = tmp_path / "noise.db"
    noise.write_bytes(random.Random(0).randbytes(8192))
    newer = tmp_path / "newer.db"
    ExternalMemory(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    for path, message in ((foreign, "another database"), (noise, "not a database"), (newer, "memory of version 9")):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=message):
            ExternalMemory(path)
        assert path.read_bytes() == before


def test_verify_tells_an_index_that_disagrees(memory):
    memory.remember("Arabam kırmızı")
    assert memory.verify() == []
    memory._db.execute("UPDATE entries SET words = 'something else'")
    assert any("search" in line for line in memory.verify())


def test_a_locked_file_is_one_line(memory, monkeypatch):
    monkeypatch.setattr(module, "BUSY_S", 0.05)
    with ExternalMemory(memory.path) as other, memory._writing(), pytest.raises(OSError, match="locked"):
        other.remember("x")


@pytest.mark.parametrize("language", ["en", "tr"])
def test_hits_among_a_thousand_facts(memory, language):
    rng, facts = random.Random(1), draw_facts(1000, language, held_out=True)
    ids = memory.remember_all([fact.text for fact in facts])
    hits = [
        ids[i] in [match.entry.id for match in memory.retrieve(ask(facts[i], rng, held_out=True), touch=False)]
        for i in rng.sample(range(1000), 200)
    ]
    assert sum(hits) / len(hits) > 0.9


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def writer(path, name, pipe, count=10**9, budget=None):
    """What a child does: opens the memory, says so, then writes and says which writes were acknowledged."""
    with ExternalMemory(path, daily_budget=budget) as memory:
        pipe.send("open")
        for i in range(count):
            try:
                pipe.send((memory.remember(f"{name} şey {i} ğ" + " word" * (i % 50)).id, i))
            except BudgetExceeded:
                pipe.send("spent")
                break
            if i % 7 == 6:
                memory.retrieve("şey word", limit=3)


def start(*arguments):
    """A forked child (it need not import PyTorch again) and the end of the pipe that its messages come from."""
    here, there = multiprocessing.Pipe(duplex=False)
    path, name, *others = arguments
    process = multiprocessing.get_context("fork").Process(target=writer, args=(path, name, there, *others))
    process.start()
    there.close()
    return process, here


def received(pipe):
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


def test_processes_share_file_and_budget(tmp_path):
    path = tmp_path / "m.db"
    children = [start(path, f"p{i}", 60, 100) for i in range(3)]
    messages = [message for _, pipe in children for message in received(pipe)]
    for process, _ in children:
        process.join(60)
        assert process.exitcode == 0
    assert sum(isinstance(message, tuple) for message in messages) == 100 and "spent" in messages
    with ExternalMemory(path, daily_budget=100) as memory:
        assert len(memory) == 100 and memory.writes_left() == 0 and memory.verify() == []


def test_kill_at_any_moment_loses_nothing(tmp_path):
    """Twenty pairs of writers to one file, one of each pair killed: what was acknowledged is there, and once."""
    rng, path, acknowledged = random.Random(0), tmp_path / "m.db", {}
    for run in range(20):
        victim, pipe = start(path, f"run{run}")
        other, other_pipe = start(path, f"other{run}", 5)
        assert pipe.recv() == "open"
        time.sleep(rng.random() * 0.1)
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        for name, messages in ((f"run{run}", received(pipe)), (f"other{run}", received(other_pipe))):
            for message in messages:
                if isinstance(message, tuple):
                    acknowledged[message[0]] = f"{name} şey {message[1]} ğ" + " word" * (message[1] % 50)
        other.join(60)
        assert other.exitcode == 0
        with ExternalMemory(path, daily_budget=None) as memory:
            assert memory.verify() == []
            kept = [(entry.id, entry.text) for entry in memory.list(limit=10**6)]
        assert len({text for _, text in kept}) == len(kept)
        assert acknowledged.items() <= dict(kept).items()
    assert len(acknowledged) > 150
