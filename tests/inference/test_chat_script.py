"""generate.py --chat: its options, through a pipe and on a terminal."""

import errno
import fcntl
import locale
import os
import pty
import re
import select
import signal
import sys
import termios
import time

import pytest
import torch

from model import ByteStream
from model.genesis.gate.policy import load_policy
from model.inference.chat import Conversation
from tests.conftest import fork
from tests.inference.conftest import say, script


def test_every_option_reaches_the_conversation(call, tiny_model, tmp_path):
    policy = tmp_path / "p.toml"
    policy.write_text('[c]\nphrases = ["a", "o"]\nword_boundaries = false')
    code, out, err = call(
        b"ilk\r\nson", "--chat", "--max-bytes", "40", "--temperature", "1.4", "--top-k", "120", "--top-p", "0.99",
        "--seed", "8", "--stop", "e", "--thinking-steps", "1", "--policy", str(policy), "--gate-log", "log",
        "--prompt", "Önce.\n\n",
    )  # fmt: skip
    expected = Conversation(
        tiny_model(), preamble="Önce.\n\n".encode(), max_bytes=40, temperature=1.4, top_k=120, top_p=0.99, seed=8,
        stop=[b"e"], thinking_steps=1, policy=load_policy(policy),
    )  # fmt: skip
    said = [say(expected, text)[0].decode() for text in (b"ilk", b"son")]
    assert (code, out) == (0, "".join(f"{text}\n" for text in said))
    logged = len((tmp_path / "log").read_text().splitlines())
    assert logged and err == (f"2 replies, {expected.generated} bytes; seed 8; gate: c {logged}, logged in log\n")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("p.toml", "log")]  # and nothing is stored


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chat", "--batch", "3"], ["--batch 3", "--chat", "1"]),
        (["--chat", "--prompt", "-"], ["--prompt -", "stdin"]),
        (["--memory", "m.db"], ["--memory 'm.db'", "--chat"]),
        (["--memory", "m.db", "--prompt", "x"], ["--memory 'm.db'", "--chat"]),
        (["--chat", "--prompt", "a", "--prompt-file", "b"], ["--prompt-file"]),
        (["--chat", "--prompt-file", "missing"], ["--prompt-file 'missing'"]),
        (["--chat", "--memory"], ["--memory"]),
        (["--chat", "--rows", "2"], ["--rows"]),
    ],
)
def test_what_makes_no_sense_with_a_chat_gets_one_line_and_code_2(call, tmp_path, arguments, words):
    code, out, err = call(b"x\n", *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stdin", [None, b"", b"\n\n", b"/quit\nx\n"])
def test_a_chat_in_which_nothing_is_said(call, stdin):
    assert call(stdin, "--chat", "--seed", "1") == (0, "", "0 replies, 0 bytes; seed 1\n")


def test_a_model_that_is_not_finite_is_one_line_and_code_1(call, monkeypatch):
    monkeypatch.setattr(ByteStream, "logits", lambda self: torch.full((1, 256), torch.nan))
    code, out, err = call(b"x\n", "--chat")
    assert (code, out) == (1, "") and err.count("\n") == 1 and "not finite" in err


def test_through_a_pipe(checkpoint, tiny_model):
    """With streams that take ASCII alone, as in a C locale; each line is answered before the next one is written."""
    stdin, stdout, stderr = os.pipe(), os.pipe(), os.pipe()

    def work():
        for fd, end in enumerate((stdin[0], stdout[1], stderr[1])):
            os.dup2(end, fd)
        os.close(stdin[1])  # or its end would never come
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode, encoding="ascii") for fd, mode in enumerate("rww"))
        arguments = ("--chat", "--seed", "2", "--threads", "1", "--max-bytes", "50", "--device", "cpu")
        assert script.main([str(checkpoint), *arguments]) == 0
        sys.stderr.flush()

    pid = fork(work)
    for end in (stdin[0], stdout[1], stderr[1]):
        os.close(end)
    expected = Conversation(tiny_model(), seed=2, max_bytes=50)
    with open(stdin[1], "wb", 0) as lines, open(stdout[0], "rb") as answers, open(stderr[0], "rb") as notes:
        for text in (b"\xff \0 \xc4\xb1", "Iğdır 😀".encode()):
            lines.write(text + b"\n")
            reply = say(expected, text)[0] + b"\n"
            assert answers.read(len(reply)) == reply
        lines.write(b"/help")
        lines.close()
        out, err = answers.read(), notes.read()
    assert os.waitpid(pid, 0)[1] == 0, err
    assert out.startswith(b"/help") and err.count(b"\n") == 1 and b"; seed 2" in err


class Terminal:
    """generate.py --chat with a terminal of its own, in a fork, which need not import PyTorch again."""

    def __init__(self, *arguments: str):
        self.fd, there = pty.openpty()
        self.seen = b""

        def work():
            os.close(self.fd)
            os.setsid()
            fcntl.ioctl(there, termios.TIOCSCTTY, 0)
            for fd in range(3):
                os.dup2(there, fd)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ |= {"TERM": "dumb", "INPUTRC": "/dev/null"}
            locale.setlocale(locale.LC_ALL, "C.UTF-8")
            sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww")
            assert script.main(list(arguments)) == 0
            sys.stderr.flush()

        self.pid = fork(work)
        os.close(there)

    def send(self, data: bytes) -> None:
        os.write(self.fd, data)

    def until(self, *wanted: bytes) -> bytes:
        """Read until these have come, one after the other → what came up to the end of the last."""
        pattern, deadline = b".*?".join(map(re.escape, wanted)), time.monotonic() + 60
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert select.select([self.fd], [], [], deadline - time.monotonic())[0], (wanted, self.seen)
            self.seen += self._read()
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def _read(self) -> bytes:
        try:
            data = os.read(self.fd, 65536)
        except OSError as error:
            assert error.errno == errno.EIO  # the other side is closed
            data = b""
        assert data, (self.end(), self.seen)
        return data

    def end(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def test_on_a_terminal(checkpoint):
    """Editing, history, streaming, Ctrl-C in a reply and at the prompt, Ctrl-D."""
    terminal = Terminal(str(checkpoint), "--chat", "--threads", "1", "--max-bytes", "100000000")
    terminal.until(b"> ")
    # What is told of an unknown command shows the line as it was read: backspace, cursor left, beginning of the line.
    terminal.send("ağx\x7fdtwo\x1b[D\x1b[D\x1b[D \x01/\r".encode())
    terminal.until("/ağd: there is no such command".encode(), b"> ")
    terminal.send(b"/second\r")
    terminal.until(b"/second: there is no", b"> ")
    terminal.send(b"\x1b[A\x1b[A\x05 \r")  # two lines up
    terminal.until("/ağd: there is no such command".encode(), b"> ")

    terminal.send("merhaba 😀\r".encode())
    terminal.until("merhaba 😀".encode(), b"\n")
    while len(terminal.seen) < 100:  # a reply that would go on for days
        terminal.seen += terminal._read()
    terminal.send(b"\x03")
    terminal.until(b"\r\nstopped\r\n", b"> ")
    terminal.send(b"/dropped")
    terminal.until(b"/dropped")
    time.sleep(0.5)  # a signal that comes just before CPython waits for a key is seen with the next key only
    terminal.send(b"\x03")
    terminal.until(b"> ")
    terminal.send(b"/temperature -1\r")
    assert b"/dropped" not in terminal.until(b"accepted is a finite number", b"> ")
    terminal.send(b"\x04")
    assert b"1 replies, " in terminal.until(b"; seed ")
    assert terminal.end() == 0
