"""Fixtures for the chat's tests: a conversation that is looked into, a chat over lines, generate.py in this process."""

import importlib.util
import io
import sys
from pathlib import Path

import pytest
import torch

from model import save_checkpoint
from model.inference.chat import Chat, Conversation

spec = importlib.util.spec_from_file_location("generate_script", Path(__file__).parents[2] / "generate.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def say(conversation: Conversation, text: bytes, memories=()) -> tuple[bytes, str]:
    """(the reply, why it ended)."""
    pieces = list(conversation.reply(text, memories))
    assert [piece.finished for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return b"".join(piece.data for piece in pieces), pieces[-1].finished


def assert_has_read(conversation: Conversation, transcript: bytes) -> None:
    """The state is that of one pass of the model over the transcript, also in what follows."""
    stream = conversation.stream
    assert stream.position == len(transcript)
    after = b" and then?"
    with torch.no_grad():
        logits = stream.model(torch.tensor([[*transcript, *after, 0]]))[:, len(transcript) :]
    found = stream.clone().score(torch.tensor([[*after, 0]]))
    assert (found - logits).abs().max() < 1e-4


class Talk:
    """A chat over a list of lines: what it wrote, what it noted, and what the model was given."""

    def __init__(self, model, memory=None, **settings):
        self.shown, self.notes, self.given = "", [], []
        self.conversation = Conversation(model, **{"max_bytes": 20, "seed": 3} | settings)
        reply = self.conversation.reply

        def recorded(text, memories=()):
            self.given.append((text, list(memories)))
            return reply(text, memories)

        self.conversation.reply = recorded
        self.lines: list[str] = []
        self.chat = Chat(self.conversation, self.read, self.write, self.notes.append, memory)

    def read(self) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def write(self, text: str) -> None:
        text.encode("utf-8")  # raises for surrogates
        self.shown += text

    def __call__(self, *lines: str) -> str:
        """Run over these lines → what was shown."""
        self.shown, self.lines = "", list(lines)
        self.notes.clear()
        self.chat.run()
        return self.shown


@pytest.fixture(scope="session")
def checkpoint(tiny_model, tmp_path_factory):
    return save_checkpoint(tiny_model(), tmp_path_factory.mktemp("chat") / "tiny.safetensors")


@pytest.fixture
def call(checkpoint, capsys, monkeypatch, tmp_path):
    """call(stdin, *arguments) → (exit code, stdout, stderr), run inside this process."""
    monkeypatch.chdir(tmp_path)

    def run(stdin: bytes | None, *arguments: str):
        monkeypatch.setattr(sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = script.main([str(checkpoint), *arguments, "--device", "cpu"])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run
