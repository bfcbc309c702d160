"""Chat: one conversation in one stream, a reply at a time, under the gate and, where there is one, with a memory.

    conversation = Conversation(model, seed=1)
    for piece in conversation.reply("Merhaba!".encode()):
        print(piece.data)
    Chat(conversation, read, write, note, memory).run()  # lines in, text out: generate.py --chat

What the model reads is, for each turn, `framed(text, memories)`, the reply and a blank line:

    Memory: what was retrieved, a line each
    User: the line
    Assistant: the reply

Notable: a reply is drawn on a branch of the conversation's stream, which is thrown away; what was given out is then
read once, in parallel. So nothing that was drawn but not said leaves a trace (the end marker, bytes that the gate held
back, half a character, the rest of a patch that was drawn ahead), and Ctrl-C at any moment leaves the whole turn, the
turn with as much of its reply as was said, or none of it.
"""

import contextlib
import random
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from model.agiformer import AGIFormer
from model.genesis.gate.automaton import compile_policy
from model.genesis.gate.byte_gate import ByteGate, GateLog
from model.genesis.gate.classifier import HiddenStateGate
from model.genesis.gate.guarded import GuardedStream
from model.genesis.gate.policy import Policy, load_policy
from model.inference.draw import (
    AheadStream,
    Piece,
    Row,
    RowStream,
    check_classifier,
    check_request,
    draw_guarded,
    give_out,
)
from model.inference.sampling import check_sampling
from model.inference.stream import ByteStream
from model.inference.text import Utf8Constraint, Utf8Emitter
from model.inference.write import Draws, write
from model.sgm.commands import forget
from model.sgm.memory import BudgetExceeded
from model.sgm.memory_entry import KINDS, MAX_TEXT, Entry
from model.sgm.memory_text import one_line, printable, shown

if TYPE_CHECKING:
    from model.sgm.routed import Routed, RoutedMemory

MEMORY, USER, ASSISTANT, END = b"Memory: ", b"User: ", b"Assistant: ", b"\n\n"
STOPS = (END, b"\n" + USER.rstrip())  # a model that goes on with the user's part has ended its own

LISTED = 50  # entries of a list, at most
# What a memory raises for a bad argument, file or database, or when its budget is used up: no reason to end a chat.
MEMORY_ERRORS = (ValueError, OSError, BudgetExceeded)

COMMANDS = {  # name: (argument, what it does)
    "help": ("", "this list"),
    "show": ("on|off", "say what was retrieved, with trust and score, and what was stored"),
    "memory": ("", "how much is remembered, and how many writes are left today"),
    "list": ("[KIND]", f"what is remembered, the last {LISTED}; kinds are {', '.join(KINDS)}"),
    "remember": ("TEXT", "remember it"),
    "forget": ("TEXT|#ID", "forget the only entry with all these words, or the entry of this number"),
    "export": ("FILE", "write what is remembered as JSON"),
    "import": ("FILE", "remember what an exported file holds"),
    "reset": ("", "begin a new conversation; what is remembered stays"),
    "temperature": ("T", "of the replies from now on; 0 always takes the most probable byte"),
    "quit": ("", "end the chat, as Ctrl-D does; Ctrl-C ends a reply"),
}
OF_MEMORY = ("show", "memory", "list", "remember", "forget", "export", "import")


def framed(text: bytes, memories: Sequence[str] = ()) -> bytes:
    """What the model reads before it replies to `text`.

    Args:
        text: the user's line, any bytes, kept as they are.
        memories: texts from the memory, each of which becomes one line.
    """
    lines = [MEMORY + one_line(memory).encode() + b"\n" for memory in memories]
    return b"".join(lines) + USER + text + b"\n" + ASSISTANT


class Conversation:
    """A conversation with a model: its stream after all turns so far, whose size does not grow with them.

    Args:
        model: as `load_checkpoint` gives it.
        preamble: bytes read before the first turn, kept as they are.
        max_bytes: bytes of a reply, at most; ≥ 1.
        temperature, top_k, top_p: see `sampling.probabilities`. `temperature` may be set between replies.
        seed: the same seed gives the same replies to the same turns; random when None.
        stop: byte strings that end a reply, besides a blank line and the beginning of a user's turn.
        thinking_steps, halt_threshold, any_bytes: as in `generate`.
        policy, log, classifier, classifier_mode: as in `generate`. The gate's text is a turn, the user's line included.

    Raises:
        ValueError: an argument out of range, naming it, its value and what is accepted.
        FloatingPointError: the model's logits are not finite; `reply` raises it too.
    """

    def __init__(
        self,
        model: AGIFormer,
        *,
        preamble: bytes = b"",
        max_bytes: int = 400,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[bytes] = (),
        thinking_steps: int | None = None,
        halt_threshold: float | None = None,
        any_bytes: bool = False,
        policy: Policy | None = None,
        log: GateLog | None = None,
        classifier: HiddenStateGate | None = None,
        classifier_mode: Literal["lower", "block"] = "lower",
    ):
        check_request([preamble], max_bytes, seed, stop, batch=1)
        check_sampling(temperature, top_k, top_p)
        check_classifier(model, classifier, classifier_mode)
        self.temperature = temperature
        self.replies = self.generated = 0  # replies, and the bytes of them that were given out
        self._max_bytes, self._top_k, self._top_p, self._any_bytes = max_bytes, top_k, top_p, any_bytes
        self._stops = (*STOPS, *stop)
        self._seeds = random.Random(secrets.randbits(63) if seed is None else seed)
        self._automaton = compile_policy(load_policy() if policy is None else policy)
        self._log, self._classifier, self._block = log, classifier, classifier_mode == "block"
        self._device = model.start.device
        # Memories reach a reply through attention's window; what has left it may be given again.
        self._reach = model.config.window * model.config.patch_size
        kind = ByteStream if classifier is None else partial(GuardedStream, gate=classifier.to(self._device))
        stream = kind(model, thinking_steps=thinking_steps, halt_threshold=halt_threshold)
        self._beginning = _after(stream, preamble)
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation, after the preamble."""
        self.stream = self._beginning  # never fed itself: what goes on from it is a branch
        self._recent: dict[str, int] = {}  # memory: bytes read before it

    def reply(self, text: bytes, memories: Sequence[str] = ()) -> Iterator[Piece]:
        """Read a turn, then generate its reply while the iterator is consumed.

        The turn becomes part of the conversation when the iterator ends, or is closed, with what it has given out.

        Args:
            text: the user's line, any bytes.
            memories: texts for the model to go by. One that is still in attention's window is not given again.
        """
        begins = self.stream.position
        recent = {memory: at for memory, at in self._recent.items() if begins - at < self._reach}
        new = [memory for memory in dict.fromkeys(memories) if memory not in recent]
        frame = framed(text, new)
        stream = _after(self.stream, frame)
        said = bytearray()
        try:
            for piece in self._draw(stream.clone(), frame):
                said += piece.data
                yield piece
        finally:
            self.stream = _after(stream, bytes(said) + END)
            self._recent = recent | dict.fromkeys(new, begins)
            self.replies += 1
            self.generated += len(said)

    def _draw(self, stream: ByteStream, frame: bytes) -> Iterator[Piece]:
        """The pieces of the reply, from a stream that has read `frame` last."""
        row = Row(0, frame, self._max_bytes, self._stops, not self._any_bytes)
        part = RowStream(stream, [row], torch.zeros(1, dtype=torch.long, device=self._device))
        constraints, seed = self._constraints(frame), self._seeds.getrandbits(63)
        if self._classifier is None:
            return write([part], constraints, self._drawer(seed)[0], [row], self._log)
        ahead = AheadStream(part, self._constraints(frame), self._drawer, seed, 1)
        steps = draw_guarded([ahead], constraints, self._device, 1, self._block, self._log)
        return give_out([row], steps, constraints[-1], self._log)

    def _constraints(self, frame: bytes) -> list:
        gate = ByteGate(self._automaton, 1, self._device).read([frame])
        return [gate] if self._any_bytes else [Utf8Constraint([frame], self._device), gate]

    def _drawer(self, seed: int) -> tuple[Draws, torch.Generator]:
        generator = torch.Generator(self._device).manual_seed(seed)
        return Draws(self.temperature, self._top_k, self._top_p, generator), generator


def _after(stream: ByteStream, data: bytes) -> ByteStream:
    """A branch of the stream that has read `data`."""
    branch = stream.clone()
    if data:
        branch.feed(torch.frombuffer(bytearray(data), dtype=torch.uint8).unsqueeze(0))
    if not branch.logits().isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its weights are damaged or it diverged")
    return branch


class Chat:
    """Lines in, replies out; what begins with "/" is a command.

    With a memory every other line goes through its router first. Commands in words (remember, forget, list) are
    answered without the model; what was retrieved with enough trust is given to the model before the line.

    Args:
        conversation: with the model.
        read: gives the next line without its end, with bytes that are not UTF-8 as surrogates ("surrogateescape");
            raises EOFError when there is none.
        write: takes text to be shown at once: replies, and answers to commands. It never holds surrogates.
        note: takes one line about something that did not work.
        memory: None for a chat without one. Nothing of it is closed here.
    """

    def __init__(
        self,
        conversation: Conversation,
        read: Callable[[], str],
        write: Callable[[str], None],
        note: Callable[[str], None],
        memory: "RoutedMemory | None" = None,
    ):
        self.conversation = conversation
        self._reader, self._writer, self._noter = read, write, note
        self._routed = memory
        self._showing = False

    def run(self) -> None:
        """Until the lines end, or /quit."""
        with contextlib.suppress(EOFError):
            while self.turn(self._reader()):
                pass

    def turn(self, line: str) -> bool:
        """Answer one line; Ctrl-C ends the answer. Returns whether the chat goes on."""
        try:
            if line.startswith("/"):
                return self._command(line)
            if line.strip():
                self._talk(line)
        except KeyboardInterrupt:
            self._note("stopped")
        return True

    def _talk(self, line: str) -> None:
        routed = None
        if self._routed is not None:
            try:
                routed = self._routed.handle(printable(line))
            except MEMORY_ERRORS as error:
                self._note(f"memory: {str(error).removeprefix('memory ')}")
        if routed is not None and routed.command is not None:
            self._answer(routed)
            return
        if routed is not None:
            self._report(routed)
        memories = [match.entry.text for match, _ in routed.retrieved] if routed is not None else []
        self._reply(line.encode("utf-8", "surrogateescape"), memories)

    def _reply(self, text: bytes, memories: list[str]) -> None:
        emitter, finished = Utf8Emitter(), None
        # Closing takes what was said into the conversation, also after Ctrl-C.
        try:
            with contextlib.closing(self.conversation.reply(text, memories)) as pieces:
                for piece in pieces:
                    self._writer(emitter.feed(piece.data))
                    finished = piece.finished
        finally:
            self._writer(emitter.close() + "\n")
        if finished == "gate":
            self._note("the reply was ended by the classifier")

    def _answer(self, routed: "Routed") -> None:
        """Tell what a command in words has done."""
        if self._refused(routed):
            return
        if routed.command == "remember":
            self._say(f"Remembered {_described(routed.stored)}")
        elif routed.command == "forget":
            self._forgot(routed.forgotten, routed.matching)
        else:
            self._listed(routed.listed)

    def _refused(self, routed: "Routed") -> bool:
        """Whether something was to be stored and is not, which is told."""
        if routed.budget_exceeded:
            self._note("memory: not stored, today's writes are used up")
        if routed.too_long:
            self._note(f"memory: not stored, the line is too long; accepted are {MAX_TEXT:,} characters")
        return routed.budget_exceeded or routed.too_long

    def _report(self, routed: "Routed") -> None:
        """Tell what the memory did about a line that is no command, where that was asked for."""
        self._refused(routed)
        if not self._showing:
            return
        if routed.decision is not None:
            self._say(f"[router: {routed.decision.action} {routed.decision.probability:.2f}]")
        if routed.stored is not None:
            self._say(f"[stored {_described(routed.stored)}]")
        for match, trust in routed.retrieved:
            self._say(f"[retrieved, trust {trust:.2f}, score {match.score:.2f}: {_described(match.entry)}]")

    def _command(self, line: str) -> bool:
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        if name not in COMMANDS:
            self._note(f"/{name}: there is no such command; there are {', '.join(f'/{each}' for each in COMMANDS)}")
            return True
        if name in OF_MEMORY and self._routed is None:
            self._note(f"/{name}: this chat has no memory; generate.py CHECKPOINT --chat --memory FILE has one")
            return True
        expected = COMMANDS[name][0]
        if bool(argument) != bool(expected) and not expected.startswith("["):
            self._note(f"/{name} {argument}: accepted is /{name} {expected}".rstrip())
            return True
        if name == "quit":
            return False
        try:
            getattr(self, f"_do_{name}")(argument)
        except MEMORY_ERRORS as error:
            self._note(f"/{name}: {error}")
        return True

    def _do_help(self, _: str) -> None:
        for name, (argument, what) in COMMANDS.items():
            self._say(f"{f'/{name} {argument}':<18} {what}{self._without(name)}")
        self._say("Any other line goes to the model; begin it with a space if it begins with a slash.")

    def _without(self, name: str) -> str:
        return " (needs --memory FILE)" if name in OF_MEMORY and self._routed is None else ""

    def _do_show(self, argument: str) -> None:
        if argument not in ("on", "off"):
            raise ValueError(f"{argument!r}: accepted are on and off")
        self._showing = argument == "on"

    def _do_memory(self, _: str) -> None:
        counts, left = self._routed.memory.counts(), self._routed.memory.writes_left()
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
        today = "no limit" if left is None else f"{left:,}"
        self._say(f"{sum(counts.values()):,} remembered: {kinds}; writes left today: {today}")

    def _do_list(self, argument: str) -> None:
        self._listed(self._routed.memory.list(argument or None, limit=LISTED))

    def _do_remember(self, argument: str) -> None:
        self._say(f"Remembered {_described(self._routed.memory.remember(printable(argument)))}")

    def _do_forget(self, argument: str) -> None:
        self._forgot(*forget(self._routed.memory, printable(argument)))

    def _do_export(self, argument: str) -> None:
        memory = self._routed.memory
        memory.export_json(_file(argument))
        self._say(f"Exported {len(memory):,} to {argument}")

    def _do_import(self, argument: str) -> None:
        new = self._routed.memory.import_json(_file(argument))
        self._say(f"Imported {new:,} new from {argument}")

    def _do_reset(self, _: str) -> None:
        self.conversation.reset()
        self._say("A new conversation.")

    def _do_temperature(self, argument: str) -> None:
        try:
            value = float(argument)
        except ValueError:
            value = argument
        check_sampling(value, None, None)
        self.conversation.temperature = value

    def _forgot(self, entries: Sequence[Entry], matching: Sequence[Entry]) -> None:
        for entry in entries:
            self._say(f"Forgot {_described(entry)}")
        if matching:
            self._listed(matching[:LISTED])
            self._say(f"These words are in {len(matching):,} entries, and none is forgotten; /forget #ID forgets one.")
        elif not entries:
            self._say("Nothing like that is remembered.")

    def _listed(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._say(_described(entry))
        if not entries:
            self._say("Nothing is remembered.")

    def _say(self, text: str) -> None:
        self._writer(shown(text) + "\n")

    def _note(self, text: str) -> None:
        self._noter(shown(one_line(text)))


def _file(argument: str) -> Path:
    try:
        return Path(argument).expanduser()
    except RuntimeError:
        raise ValueError(f"{argument!r}: there is no such user; accepted is a file") from None


def _described(entry: Entry) -> str:
    return f"#{entry.id} {entry.kind}: {one_line(entry.text)}"
