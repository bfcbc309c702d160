"""External memory: facts, episodes and skills in one SQLite file, found by full text with BM25 (seed 001).

    with ExternalMemory("memory.db") as memory:
        memory.remember("Arabam kırmızı.")
        memory.retrieve("arabamın rengi ne?")     → [Match(entry=Entry(id=1, text="Arabam kırmızı.", ...), score=...)]

Notable: any number of processes may share the file. Writing takes one `BEGIN IMMEDIATE` transaction, in which
duplicates and the day's budget are looked up too; it is on the disk when the call returns (WAL, synchronous=FULL), so a
process killed at any moment loses nothing that was acknowledged, and leaves nothing half done. What is searched are
folded words (`memory_text`) in two columns, whole and cut to their first `STEM` characters. Cutting stands for
stemming, above all in Turkish, whose endings pile up at the end of a word (Can et al. 2008, "Information retrieval on
Turkish texts").
"""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from model.files import write_atomically
from model.sgm.memory_entry import (
    KINDS,
    Entry,
    Match,
    calendar_day,
    check_integer,
    check_kind,
    checked,
    checked_text,
)
from model.sgm.memory_json import exported, read_export
from model.sgm.memory_text import INFLECTED, contains_all, identity, search_words, stem

VERSION = 1
APPLICATION_ID = 0x41474D31  # tells our files from other SQLite databases
OWN_FILES = ("", "-wal", "-shm", "-journal", ".router.safetensors")  # by what follows the database's path
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


class BudgetExceeded(RuntimeError):
    """The day's writes are used up."""


_MERGED = ("confidence", "created", "accessed", "accesses")
_COLUMNS = ", ".join(field.name for field in fields(Entry))


def _made(row: tuple) -> Entry:
    entry = Entry(*row)
    return replace(entry, **{name: float(getattr(entry, name)) for name in ("confidence", "created", "accessed")})


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
            check_integer("daily_budget", daily_budget, 0)
        self.path, self.daily_budget, self._clock = Path(path), daily_budget, clock
        if os.path.isdir(path):
            raise ValueError(f"path={str(path)!r}: a folder; accepted is a file")
        # Resolved now, since the working directory may change; SQLite puts its own beside what a link points to.
        bases = (self.path, os.path.realpath(self.path))
        self._own = {os.path.realpath(f"{base}{end}") for base in bases for end in OWN_FILES}
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
        if self._format() != (APPLICATION_ID, VERSION):
            with self._writing():
                found = self._format()  # another process may have been first
                if found == (0, 0) and not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in _statements(SCHEMA):
                        self._db.execute(statement)
                elif found != (APPLICATION_ID, VERSION):
                    kind = f"a memory of version {found[1]}" if found[0] == APPLICATION_ID else "another database"
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

    def _format(self) -> tuple[int, int]:
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
        text = checked(text, kind, confidence, source)
        now = self._now()
        with self._writing():
            row = self._db.execute(
                "UPDATE entries SET confidence = max(confidence, ?), accessed = ?, accesses = accesses + 1 "
                f"WHERE kind = ? AND digest = ? RETURNING {_COLUMNS}",
                (confidence, now, kind, identity(text)),
            ).fetchall()
            if row:
                return _made(row[0])
            day = calendar_day(now)
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
        texts, now = [checked(text, kind, 1.0, source) for text in texts], self._now()
        with self._writing():
            ids = {}
            for text in texts:
                digest = identity(text)
                if digest not in ids:
                    row = self._db.execute(
                        "SELECT id FROM entries WHERE kind = ? AND digest = ?", (kind, digest)
                    ).fetchone()
                    ids[digest] = row[0] if row else self._insert(Entry(0, kind, text, 1.0, now, now, 0, source)).id
            return [ids[identity(text)] for text in texts]

    def _insert(self, entry: Entry) -> Entry:
        words = search_words(entry.text)
        row = self._db.execute(
            "INSERT INTO entries (kind, text, confidence, created, accessed, accesses, source, digest, words, stems) "
            f"VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING {_COLUMNS}",
            (
                entry.kind, entry.text, entry.confidence, entry.created, entry.accessed, entry.accesses, entry.source,
                identity(entry.text), " ".join(words), " ".join(map(stem, words)),
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
        check_integer("id", id, 1)
        with self._writing():
            rows = self._db.execute(f"DELETE FROM entries WHERE id = ? RETURNING {_COLUMNS}", (id,)).fetchall()
        return _made(rows[0]) if rows else None

    def forget_matching(self, query: str) -> list[Entry]:
        """Remove the entry that contains all words of the query, where it is the only one that does.

        A word is contained where it is there whole, but for a grammatical ending of a long one (`same_word`).

        Returns:
            The entries that contain them, the oldest first: one, which is gone, or several, of which none is; none
            where the query has no words.
        """
        words = list(dict.fromkeys(search_words(checked_text("query", query))))
        if not words:
            return []
        # Those that may be: a word that has an ending begins as it does without.
        near = (f'words:"{word[:INFLECTED]}"' + "*" * (len(word) >= INFLECTED) for word in words[:MAX_QUERY])
        with self._writing():
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM entries "
                "WHERE id IN (SELECT rowid FROM search WHERE search MATCH ?) ORDER BY id",
                (" AND ".join(near),),
            ).fetchall()
            found = [entry for entry in map(_made, rows) if contains_all(search_words(entry.text), words)]
            if len(found) == 1:
                self._db.execute("DELETE FROM entries WHERE id = ?", (found[0].id,))
        return found

    def writes_left(self) -> int | None:
        """New entries that today's budget still allows; None without a budget."""
        if self.daily_budget is None:
            return None
        with self._reported():
            return max(0, self.daily_budget - self._written(calendar_day(self._now())))

    def _written(self, day: str) -> int:
        row = self._db.execute("SELECT count FROM writes WHERE day = ?", (day,)).fetchone()
        return row[0] if row else 0

    def _now(self) -> float:
        now = self._clock()
        calendar_day(now)
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
        check_integer("limit", limit, 1)
        wanted = KINDS if kinds is None else tuple(kinds)
        for kind in wanted:
            check_kind(kind)
        words = list(dict.fromkeys(search_words(checked_text("query", query))))[:MAX_QUERY]
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

    def list(self, kind: str | None = None, *, limit: int | None = 50, offset: int = 0) -> list[Entry]:
        """Entries, of one kind or all, the newest first; at most `limit`, or all there are."""
        if kind is not None:
            check_kind(kind)
        if limit is not None:
            check_integer("limit", limit, 1)
        check_integer("offset", offset, 0)
        with self._reported():
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM entries WHERE ? IS NULL OR kind = ? "
                "ORDER BY created DESC, id DESC LIMIT ? OFFSET ?",
                (kind, kind, -1 if limit is None else limit, offset),
            ).fetchall()
        return [_made(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """How many entries there are of each of KINDS."""
        with self._reported():
            found = dict(self._db.execute("SELECT kind, count(*) FROM entries GROUP BY kind"))
        return {kind: found.get(kind, 0) for kind in KINDS}

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
        """Write all entries, as they are at one moment, to a file that is whole or not there.

        Raises:
            ValueError: the path is a folder or a device, or a file of the memory's own (OWN_FILES).
            OSError: the file cannot be written.
        """
        name = repr(os.fspath(path))
        try:
            if os.path.realpath(path) in self._own:
                raise ValueError("of the memory itself; accepted is another file")
            if os.path.exists(path) and not os.path.isfile(path):
                raise ValueError("no file, but a folder or device; accepted is a file that can be written")
        except ValueError as error:  # also of a NUL in the path
            raise ValueError(f"path={name}: {error}") from None
        with self._reported():
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM entries ORDER BY id").fetchall()
        data = exported([_made(row) for row in rows])
        try:
            return write_atomically(path, data)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"path={name}: {reason}; accepted is a file that can be written") from None

    def import_json(self, path: str | os.PathLike) -> int:
        """Add the entries of an exported file: all, or none where one is not accepted. No budget is used.

        Entries get new ids. One whose text is here already merges with it: the earlier creation, the later access, the
        larger confidence and count; so importing a file twice changes nothing.

        Returns:
            How many entries are new.

        Raises:
            ValueError: the file cannot be read or is no export, with the entry that is wrong.
        """
        entries = read_export(path)
        with self._writing():
            new = 0
            for entry in entries:
                merged = self._db.execute(
                    "UPDATE entries SET confidence = max(confidence, ?), created = min(created, ?), "
                    "accessed = max(accessed, ?), accesses = max(accesses, ?) WHERE kind = ? AND digest = ?",
                    (*(getattr(entry, name) for name in _MERGED), entry.kind, identity(entry.text)),
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
