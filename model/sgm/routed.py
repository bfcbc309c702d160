"""A memory that messages pass through: explicit commands are carried out, the router decides about all others.

chat = RoutedMemory(ExternalMemory("memory.db"), MemoryRouter.load_or_train("router.safetensors"))
chat.handle("My dog is called Rex.").stored       → Entry(...)
chat.handle("What is my dog called?").retrieved   → [(Match(...), 0.97)]
"""

from dataclasses import dataclass, field

from model.sgm.commands import Command, forget, parse_command
from model.sgm.memory import BudgetExceeded, ExternalMemory
from model.sgm.memory_entry import MAX_TEXT, Entry, Match
from model.sgm.router import Decision, MemoryRouter
from model.sgm.trust import CANDIDATES

STORE_PROBABILITY = 0.6  # below it a message is not stored: what is stored wrongly stays


@dataclass(frozen=True)
class Routed:
    """What became of a message.

    decision: the router's; None for an explicit command, whose name is `command`. matching: entries of which "forget"
    may have meant any, so that none is forgotten. retrieved: matches with their trust, the most trusted first, all at
    or above the threshold. budget_exceeded, too_long: it was to be stored, but the day's writes are used up, or it has
    more than MAX_TEXT characters.
    """

    decision: Decision | None = None
    command: str | None = None
    stored: Entry | None = None
    forgotten: list[Entry] = field(default_factory=list)
    matching: list[Entry] = field(default_factory=list)
    listed: list[Entry] = field(default_factory=list)
    retrieved: list[tuple[Match, float]] = field(default_factory=list)
    budget_exceeded: bool = False
    too_long: bool = False


class RoutedMemory:
    """A memory that messages pass through.

    Args:
        threshold: trust, in [0, 1], below which a match is not retrieved.
        limit: matches retrieved for a message, at most.
    """

    def __init__(self, memory: ExternalMemory, router: MemoryRouter, *, threshold: float = 0.5, limit: int = 5):
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold!r}: accepted is a number from 0 to 1")
        self.memory, self.router, self.threshold, self.limit = memory, router, threshold, limit

    def handle(self, text: str) -> Routed:
        """Carry out an explicit command; else store the message, retrieve for it, or neither.

        Raises:
            ValueError: `text` is no str, or the text or number of an explicit command is not accepted.
        """
        if not isinstance(text, str):
            raise ValueError(f"text={text!r}: accepted is a text (str)")
        if command := parse_command(text):
            return self._carry_out(command)
        text, too_long = text.strip(), len(text.strip()) > MAX_TEXT
        if too_long and (begun := parse_command(text[:MAX_TEXT])) and begun.name == "remember":
            return Routed(command="remember", too_long=True)
        decision = self.router.decide(text)
        if decision.action == "store" and text and decision.probability >= STORE_PROBABILITY:
            if too_long:
                return Routed(decision, too_long=True)
            return self._store(text, decision.kind, decision.trust, decision=decision)
        if decision.action == "retrieve":
            return Routed(decision, retrieved=self.retrieve(text))
        return Routed(decision)

    def retrieve(self, query: str) -> list[tuple[Match, float]]:
        """The trusted matches of a query, whatever the router says of it; counts an access to each."""
        matches = self.memory.retrieve(query, limit=max(CANDIDATES, self.limit), touch=False)
        ranked = sorted(zip(matches, self.router.trust(query, matches)), key=lambda pair: -pair[1])
        trusted = [pair for pair in ranked if pair[1] >= self.threshold][: self.limit]
        self.memory.touch([match.entry for match, _ in trusted])
        return trusted

    def _carry_out(self, command: Command) -> Routed:
        if command.name == "list":
            return Routed(command="list", listed=self.memory.list(command.argument or None))
        if command.name == "remember":
            return self._store(command.argument, self.router.decide(command.argument).kind, 1.0, command="remember")
        forgotten, matching = forget(self.memory, command.argument)
        return Routed(command="forget", forgotten=forgotten, matching=matching)

    def _store(self, text: str, kind: str, confidence: float, **outcome) -> Routed:
        try:
            return Routed(**outcome, stored=self.memory.remember(text, kind, confidence=confidence))
        except BudgetExceeded:
            return Routed(**outcome, budget_exceeded=True)
