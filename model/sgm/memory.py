"""External memory: facts, episodes and skills in one SQLite file, found by full text with BM25 (seed 001).

    with ExternalMemory("memory.db") as memory:
        memory.remember("Arabam kırmızı.")
        memory.retrieve("arabamın rengi ne?")     → [Match(entry=Entry(id=1, text="Arabam kırmızı.", ...), score=...)]

Notable: any number of processes may share the file. Writing takes one `BEGIN IMMEDIATE` transaction, in which
duplicates and the day's budget are looked up too; it is on the disk when the call returns (WAL, synchronous=FULL), so a
process killed at any moment loses nothing that was acknowledged, and leaves nothing half done. What is searched is
folded text (`model.genesis.gate.folding`: case, accents, ı and i are one) in two columns, whole words and words cut to
their first `STEM` characters. Cutting stands for stemming, above all in Turkish, whose endings pile up at the end of a
word (Can et al. 2008, "Information retrieval on Turkish texts").
"""

import contextlib
import hashlib
import json
import math
import os
import re
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from model.files import write_atomically
from model.genesis.gate.folding import fold

KINDS = ("fact", "episode", "skill")
FORMAT, VERSION = "agiformer.memory", 1
APPLICATION_ID = 0x41474D31  # tells our files from other SQLite databases
STEM = 4  # characters; chosen by hit rates, docs/memory.md
MAX_TEXT = 10_000  # characters of an entry
MAX_QUERY = 64  # different words of a query that count
BUSY_S = 30.0  # how long a call waits for other processes' writes

SCHEMA = f"""
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, so that forgetting by id cannot hit another entry
    kind TEXT NOT NULL CHECK (kind IN {KINDS}),
    text TEXT NOT NULL,
    confidence REAL NOT NULL CHECK (confidence BETWEEN 0 AND 1),
    created REAL NOT NULL,
    accessed REAL NOT NULL,
    accesses INTEGER NOT NULL,
    source TEXT NOT NULL,
    digest BLOB NOT NULL,                  -- of what makes two texts the same
    words TEXT NOT NULL,
    stems TEXT NOT NULL,
    UNIQUE (kind, digest)
);
CREATE TABLE writes (day TEXT PRIMARY KEY, count INTEGER NOT NULL);
CREATE VIRTUAL TABLE search USING fts5(
    words, stems, content='entries', content_rowid='id', tokenize="ascii tokenchars '_'"
);
CREATE TRIGGER entry_added AFTER INSERT ON entries BEGIN
    INSERT INTO search(rowid, words, stems) VALUES (new.id, new.words, new.stems);
END;
CREATE TRIGGER entry_removed AFTER DELETE ON entries BEGIN
    INSERT INTO search(search, rowid, words, stems) VALUES ('delete', old.id, old.words, old.stems);
END;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
"""
# Characters that are words by themselves: pictographs, and scripts that write no spaces.
_TOKEN = re.compile(r"[\u2600-\u27bf\u2e80-\u9fff\U0001f000-\U0003ffff]|[^\W\u2e80-\u9fff\U0001f000-\U0003ffff]+")
_APOSTROPHE = re.compile(r"(?<=\w\w)['’ʼ]\w+")


@dataclass(frozen=True)
class Entry:
    """One memory. created, accessed: seconds since 1970; confidence: in [0, 1]; source: who said it."""

    id: int
    kind: str
    text: str
    confidence: float
    created: float
    accessed: float
    accesses: int
    source: str


@dataclass(frozen=True)
class Match:
    """A retrieved entry and its BM25 score, larger for better ones; scores of different queries do not compare."""

    entry: Entry
    score: float


class BudgetExceeded(RuntimeError):
    """The day's writes are used up."""


_MERGED = ("confidence", "created", "accessed", "accesses")
_COLUMNS = ", ".join(field.name for field in fields(Entry))


def _made(row: tuple) -> Entry:
    entry = Entry(*row)
    return replace(entry, **{name: float(getattr(entry, name)) for name in ("confidence", "created", "accessed")})


def search_words(text: str) -> list[str]:
    """The folded words of a text, in order: "Ayşe'nin arabası" → ["ayse", "arabasi"].

    What follows an apostrophe is an ending, in Turkish names as in English, and is left out.
    """
    return _TOKEN.findall(_APOSTROPHE.sub("", fold(text)))


def stem(word: str) -> str:
    """What a word is found by besides itself: its first STEM characters."""
    return word[:STEM]


def _digest(text: str) -> bytes:
    """The same for texts that differ in case, spaces, normalisation and a full stop, but not in accents."""
    same = unicodedata.normalize("NFKC", text).casefold().replace("ı", "i").replace("\u0307", "")
    return hashlib.sha256(" ".join(same.split()).rstrip(".!… ").encode()).digest()


class ExternalMemory:
    """A file of memories. A context manager; safe with several processes and threads.

    Args:
        path: the file; made, with its folder, when missing.
        daily_budget: new entries a calendar day (UTC) that `remember` accepts of all processes together; None for any.
        clock: gives the seconds since 1970.

    Raises:
        ValueError: the file is something else, or damaged; or an argument is not accepted.
        OSError: the file cannot be opened or written.
    """

    def __init__(
        self, path: str | os.PathLike, *, daily_budget: int | None = 100, clock: Callable[[], float] = time.time
    ):
        if daily_budget is not None:
            _check_integer("daily_budget", daily_budget, 0)
        self.path, self.daily_budget, self._clock = Path(path), daily_budget, clock
        if self.path.is_dir():
            raise ValueError(f"path={str(path)!r}: a folder; accepted is a file")
        self._lock = threading.RLock()
        with self._reported():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            with self._reported():
                self._open()
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        if not self._db.execute("SELECT sqlite_compileoption_used('ENABLE_FTS5')").fetchone()[0]:
            raise ValueError(f"sqlite {sqlite3.sqlite_version}: built without FTS5; accepted is a build that has it")
        identity = self._identity()
        if identity != (APPLICATION_ID, VERSION):
            with self._writing():
                identity = self._identity()  # another process may have been first
                if identity == (0, 0) and not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in _statements(SCHEMA):
                        self._db.execute(statement)
                elif identity != (APPLICATION_ID, VERSION):
                    kind = f"a memory of version {identity[1]}" if identity[0] == APPLICATION_ID else "another database"
                    raise ValueError(f"memory {self.path}: {kind}; accepted is a memory of version {VERSION}")
        # Changing to WAL does not wait for others by itself.
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA secure_delete = ON")

    def _identity(self) -> tuple[int, int]:
        return tuple(self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Errors of the database in one line that names the file."""
        with self._lock:
            try:
                yield
            except sqlite3.ProgrammingError as error:
                raise ValueError(f"memory {self.path}: {error}") from None
            except (sqlite3.OperationalError, OSError) as error:
                raise OSError(f"memory {self.path}: {error}") from None
            except sqlite3.DatabaseError as error:
                raise ValueError(f"memory {self.path}: {error}; accepted is a memory that is whole") from None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction that no other process's comes between."""
        with self._reported():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file; further calls raise ValueError."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> "ExternalMemory":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __len__(self) -> int:
        with self._reported():
            return self._db.execute("SELECT count(*) FROM entries").fetchone()[0]

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def remember(self, text: str, kind: str = "fact", *, confidence: float = 1.0, source: str = "user") -> Entry:
        """Keep a text; it is on the disk when this returns.

        The same text of the same kind again, but for case, spaces and a full stop, refreshes its entry and costs no
        budget: accessed now, once more, with the larger confidence.

        Raises:
            ValueError: the text is empty or longer than MAX_TEXT, or another argument is not accepted.
            BudgetExceeded: the day's budget is used up.
        """
        text = _checked(text, kind, confidence, source)
        now = self._now()
        with self._writing():
            row = self._db.execute(
                "UPDATE entries SET confidence = max(confidence, ?), accessed = ?, accesses = accesses + 1 "
                f"WHERE kind = ? AND digest = ? RETURNING {_COLUMNS}",
                (confidence, now, kind, _digest(text)),
            ).fetchall()
            if row:
                return _made(row[0])
            day = _day(now)
            if self.daily_budget is not None and self._written(day) >= self.daily_budget:
                raise BudgetExceeded(
                    f"daily_budget={self.daily_budget}: used up on {day} (UTC); "
                    "accepted is a write tomorrow, or a larger budget"
                )
            self._db.execute(
                "INSERT INTO writes VALUES (?, 1) ON CONFLICT (day) DO UPDATE SET count = count + 1", (day,)
            )
            return self._insert(Entry(0, kind, text, float(confidence), now, now, 0, source))

    def remember_all(self, texts: Sequence[str], kind: str = "fact", *, source: str = "user") -> "list[int]":
        """Keep several texts in one transaction, without using the budget. Returns their ids, in order."""
        texts, now = [_checked(text, kind, 1.0, source) for text in texts], self._now()
        with self._writing():
            ids = {}
            for text in texts:
                digest = _digest(text)
                if digest not in ids:
                    row = self._db.execute(
                        "SELECT id FROM entries WHERE kind = ? AND digest = ?", (kind, digest)
                    ).fetchone()
                    ids[digest] = row[0] if row else self._insert(Entry(0, kind, text, 1.0, now, now, 0, source)).id
            return [ids[_digest(text)] for text in texts]

    def _insert(self, entry: Entry) -> Entry:
        words = search_words(entry.text)
        row = self._db.execute(
            "INSERT INTO entries (kind, text, confidence, created, accessed, accesses, source, digest, words, stems) "
            f"VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING {_COLUMNS}",
            (
                entry.kind, entry.text, entry.confidence, entry.created, entry.accessed, entry.accesses, entry.source,
                _digest(entry.text), " ".join(words), " ".join(map(stem, words)),
            ),
        ).fetchall()  # fmt: skip
        return _made(row[0])

    def touch(self, entries: Sequence[Entry]) -> None:
        """Count an access to each of the entries."""
        if entries:
            now = self._now()
            with self._writing():
                self._db.executemany(
                    "UPDATE entries SET accessed = ?, accesses = accesses + 1 WHERE id = ?",
                    [(now, each.id) for each in entries],
                )

    def forget(self, id: int) -> Entry | None:
        """Remove an entry for good. Returns what it was, None where there is none of that id."""
        _check_integer("id", id, 1)
        with self._writing():
            rows = self._db.execute(f"DELETE FROM entries WHERE id = ? RETURNING {_COLUMNS}", (id,)).fetchall()
        return _made(rows[0]) if rows else None

    def forget_matching(self, query: str) -> list[Entry]:
        """Remove the entries that contain all words of the query; none where it has no words.

        A word is contained where it, or it with more or less of an ending, is there: one begins with the other and both
        have at least three characters. Words that are only cut alike do not suffice.
        """
        words = list(dict.fromkeys(search_words(_checked_text("query", query))))
        if not words:
            return []
        match = " AND ".join(f'words:"{word[:3]}"' + "*" * (len(word) > 2) for word in words)
        with self._writing():
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM entries "
                "WHERE id IN (SELECT rowid FROM search WHERE search MATCH ?) ORDER BY id",
                (match,),
            ).fetchall()
            entries = [entry for entry in (_made(row) for row in rows) if _contains(search_words(entry.text), words)]
            self._db.executemany("DELETE FROM entries WHERE id = ?", [(entry.id,) for entry in entries])
        return entries

    def writes_left(self) -> int | None:
        """New entries that today's budget still allows; None without a budget."""
        if self.daily_budget is None:
            return None
        with self._reported():
            return max(0, self.daily_budget - self._written(_day(self._now())))

    def _written(self, day: str) -> int:
        row = self._db.execute("SELECT count FROM writes WHERE day = ?", (day,)).fetchone()
        return row[0] if row else 0

    def _now(self) -> float:
        now = self._clock()
        _day(now)
        return float(now)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def retrieve(
        self, query: str, *, limit: int = 5, kinds: Sequence[str] | None = None, touch: bool = True
    ) -> list[Match]:
        """The entries that share words with the query, best first; newer ones first among equals.

        Args:
            query: any text; its first MAX_QUERY different words count.
            limit: at most so many, ≥ 1.
            kinds: of these only.
            touch: count an access to each; costs one write.

        Raises:
            ValueError: an argument is not accepted.
        """
        _check_integer("limit", limit, 1)
        wanted = KINDS if kinds is None else tuple(kinds)
        for kind in wanted:
            _check_kind(kind)
        words = list(dict.fromkeys(search_words(_checked_text("query", query))))[:MAX_QUERY]
        if not words or not wanted:
            return []
        terms = dict.fromkeys(f'words:"{word}"' for word in words) | dict.fromkeys(
            f'stems:"{stem(word)}"' for word in words
        )
        marks = ", ".join("?" * len(wanted))
        only = f"AND rowid IN (SELECT id FROM entries WHERE kind IN ({marks})) " if kinds is not None else ""
        with self._reported():
            # The best are found in the index alone; the join then reads no other row.
            rows = self._db.execute(
                f"SELECT {_COLUMNS}, -score FROM (SELECT rowid AS hit, bm25(search) AS score FROM search "
                f"WHERE search MATCH ? {only}ORDER BY score, rowid DESC LIMIT ?) JOIN entries ON id = hit "
                "ORDER BY score, id DESC",
                (" OR ".join(terms), *(wanted if only else ()), limit),
            ).fetchall()
        matches = [Match(_made(row[:-1]), row[-1]) for row in rows]
        if touch:
            self.touch([match.entry for match in matches])
        return matches

    def list(self, kind: str | None = None, *, limit: int = 50, offset: int = 0) -> list[Entry]:
        """Entries, of one kind or all, the newest first."""
        if kind is not None:
            _check_kind(kind)
        _check_integer("limit", limit, 1)
        _check_integer("offset", offset, 0)
        with self._reported():
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM entries WHERE ? IS NULL OR kind = ? "
                "ORDER BY created DESC, id DESC LIMIT ? OFFSET ?",
                (kind, kind, limit, offset),
            ).fetchall()
        return [_made(row) for row in rows]

    def verify(self) -> "list[str]":
        """What is wrong with the file: what SQLite says of the database, and of its index against the table."""
        with self._reported():
            found = [row[0] for row in self._db.execute("PRAGMA integrity_check") if row[0] != "ok"]
        with self._writing():
            try:
                self._db.execute("INSERT INTO search(search, rank) VALUES ('integrity-check', 1)")
            except sqlite3.DatabaseError as error:
                found.append(f"search: {error}")
        return found

    # ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def export_json(self, path: str | os.PathLike) -> Path:
        """Write all entries, as they are at one moment, to a file that is whole or not there."""
        with self._reported():
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM entries ORDER BY id").fetchall()
        data = {"format": FORMAT, "version": VERSION, "entries": [asdict(_made(row)) for row in rows]}
        return write_atomically(path, (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode())

    def import_json(self, path: str | os.PathLike) -> int:
        """Add the entries of an exported file: all, or none where one is not accepted. No budget is used.

        Entries get new ids. One whose text is here already merges with it: the earlier creation, the later access, the
        larger confidence and count; so importing a file twice changes nothing.

        Returns:
            How many entries are new.

        Raises:
            ValueError: the file cannot be read or is no export, with the entry that is wrong.
        """
        entries = _read_export(path)
        with self._writing():
            new = 0
            for entry in entries:
                merged = self._db.execute(
                    "UPDATE entries SET confidence = max(confidence, ?), created = min(created, ?), "
                    "accessed = max(accessed, ?), accesses = max(accesses, ?) WHERE kind = ? AND digest = ?",
                    (*(getattr(entry, name) for name in _MERGED), entry.kind, _digest(entry.text)),
                ).rowcount
                if not merged:
                    self._insert(entry)
                    new += 1
        return new


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: executescript would commit the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if statement.strip() and sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _contains(text: list[str], query: list[str]) -> bool:
    def alike(a: str, b: str) -> bool:
        return a == b or (min(len(a), len(b)) >= 3 and (a.startswith(b) or b.startswith(a)))

    return all(any(alike(word, other) for other in text) for word in query)


def _read_export(path: str | os.PathLike) -> list[Entry]:
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"import {path}: {error.strerror or error}; accepted is a readable file") from None
    except (ValueError, RecursionError):
        raise ValueError(f"import {path}: not JSON; accepted is a file that export wrote") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("entries"), list):
        raise ValueError(f"import {path}: no export of a memory; accepted is a file that export wrote")
    if data.get("version") != VERSION:
        raise ValueError(f"import {path}: version {data.get('version')!r}; accepted is {VERSION}")
    entries = []
    for number, values in enumerate(data["entries"], 1):
        try:
            entries.append(_entry(values))
        except ValueError as error:
            raise ValueError(f"import {path}: entry {number}: {error}") from None
    return entries


def _entry(values: object) -> Entry:
    names = [field.name for field in fields(Entry)]
    if not isinstance(values, dict) or set(values) != set(names):
        raise ValueError(f"accepted is an object with {', '.join(names)}")
    entry = Entry(**values)
    text = _checked(entry.text, entry.kind, entry.confidence, entry.source)
    for name in ("created", "accessed"):
        _day(getattr(entry, name), name)
    _check_integer("accesses", entry.accesses, 0)
    return replace(entry, text=text)


def _checked(text: str, kind: str, confidence: float, source: str) -> str:
    """The text without the spaces around it; ValueError where an argument is not accepted."""
    text = _checked_text("text", text).strip()
    if not text or len(text) > MAX_TEXT:
        shown = text if len(text) < 50 else f"{text[:50]}… ({len(text)} characters)"
        raise ValueError(f"text={shown!r}: accepted is a text of 1 to {MAX_TEXT} characters")
    _check_kind(kind)
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        raise ValueError(f"confidence={confidence!r}: accepted is a number from 0 to 1")
    _checked_text("source", source)
    return text


def _checked_text(name: str, text: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{name}={text!r}: accepted is a text (str)")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}={text[:50]!r}: half of a surrogate pair; accepted is Unicode text") from None
    return text


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: accepted are {', '.join(KINDS)}")


def _check_integer(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise ValueError(f"{name}={value!r}: accepted is an integer ≥ {least}")


def _day(seconds: float, name: str = "clock") -> str:
    """The calendar day, UTC, of a time."""
    try:
        if isinstance(seconds, bool) or not math.isfinite(seconds):
            raise ValueError
        return datetime.fromtimestamp(seconds, UTC).date().isoformat()
    except (TypeError, ValueError, OverflowError, OSError):
        raise ValueError(f"{name}={seconds!r}: accepted are seconds since 1970") from None
