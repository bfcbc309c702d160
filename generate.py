r"""Generate text from a checkpoint.

    python generate.py best_model_curriculum.safetensors --prompt "Once upon a time"
    python generate.py best_model_curriculum.safetensors --prompt "Q: Why? A:" --stop "\n" --temperature 0
    python generate.py checkpoints/last_model_curriculum.safetensors --prompt-file story.txt --max-bytes 2000 --seed 7
    cat story.txt | python generate.py best_model_curriculum.safetensors --batch 3 --top-p 0.9
    python generate.py best_model_curriculum.safetensors --prompt "Dear" --policy names.toml --gate-log gate_log.jsonl
    python generate.py best_model_curriculum.safetensors --chat --memory memory.db

The continuation goes to stdout as UTF-8, each character as soon as it is certain; everything else goes to stderr. With
--batch, samples are printed one after the other: the first as it comes, each later one as soon as the one before
it is complete. With --chat every line of stdin is answered, and Ctrl-C ends an answer. Exit codes: 0 done (also when
the reader of stdout goes away), 1 the output cannot be written or the model's numbers are not finite, 2 a bad
argument or a missing or damaged file, 130 Ctrl-C.
"""

import argparse
import contextlib
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from model.cli import Parser

ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"0": b"\0", b"\\": b"\\"}
ESCAPES_ACCEPTED = r"\n \r \t \0 \\ \xHH \uHHHH"


def fail(message: str, code: int) -> None:
    """One line on stderr, then exit."""
    print(f"generate.py: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def integer(low: int, high: float = math.inf):
    """An argparse type: an integer in low … high."""
    accepted = f"an integer of at least {low}" if high == math.inf else f"an integer from {low} to {high}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: accepted is {accepted}")
        return value

    return read


def number(accepted: str, holds):
    """An argparse type: a number for which `holds` is true, described by `accepted`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r}: accepted is {accepted}")
        return value

    return read


def stop_string(text: str) -> bytes:
    """An argparse type: bytes, with escapes understood."""

    def replace(match: re.Match) -> bytes:
        escape = match[1]
        if escape[:1] in b"xu" and len(escape) > 1:
            code = int(escape[1:], 16)
            return bytes([code]) if escape[:1] == b"x" else chr(code).encode("utf-8", "surrogatepass")
        if escape not in ESCAPES:
            raise argparse.ArgumentTypeError(f"{text!r}: accepted escapes are {ESCAPES_ACCEPTED}")
        return ESCAPES[escape]

    data = re.sub(rb"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.|$)", replace, os.fsencode(text), flags=re.DOTALL)
    if not data:
        raise argparse.ArgumentTypeError(f"{text!r}: accepted is a string of at least one byte")
    return data


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="generate.py",
        description="Generate text from a checkpoint; it goes to stdout as it comes, everything else to stderr.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help=".safetensors of train_curriculum.py, or a .pth state dict; a bare name is also sought in checkpoints/",
    )
    prompt = parser.add_argument_group("prompt", "any length, also empty; default: stdin when piped, else empty")
    prompt = prompt.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads stdin, byte for byte")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file to continue, byte for byte")

    add = parser.add_argument_group("chat").add_argument
    add(
        "--chat", action="store_true",
        help="answer line after line, in one conversation; /help lists what else it understands; a prompt comes before "
        "it, and --max-bytes and --stop are those of a reply",
    )  # fmt: skip
    add("--memory", metavar="FILE", help="what --chat remembers and goes by, for good; made when missing")

    add = parser.add_argument_group("what is generated").add_argument
    add("--max-bytes", type=integer(1), default=400, metavar="N", help="bytes per sample, at most (default 400)")
    add(
        "--stop", type=stop_string, action="append", default=[], metavar="TEXT",
        help=f"end a sample before this text; repeatable; escapes {ESCAPES_ACCEPTED} (default: none)",
    )  # fmt: skip
    add("--batch", type=integer(1), default=1, metavar="N", help="samples of the prompt, each different (default 1)")
    add("--any-bytes", action="store_true", help="allow bytes that are not UTF-8, printed as U+FFFD (default: UTF-8)")

    add = parser.add_argument_group("sampling").add_argument
    add(
        "--temperature", type=number("a finite number of at least 0", lambda x: 0 <= x < math.inf), default=0.8,
        metavar="T", help="0 always takes the most probable byte (default 0.8)",
    )  # fmt: skip
    add("--top-k", type=integer(1, 256), metavar="K", help="only the K most probable bytes, 1 to 256 (default: all)")
    add(
        "--top-p", type=number("a number above 0 and up to 1", lambda x: 0 < x <= 1), metavar="P",
        help="only the smallest set of bytes with this probability in all (default: all)",
    )  # fmt: skip
    add("--seed", type=integer(0, 2**63 - 1), metavar="N", help="the same seed gives the same text (default: random)")

    add = parser.add_argument_group("gate", "what is never written (docs/gate.md); always on").add_argument
    add("--policy", action="append", default=[], metavar="FILE", help="rules besides the default ones; repeatable")
    add("--policy-only", metavar="FILE", help="rules instead of the default ones")
    add("--gate-log", metavar="FILE", help="where interventions go, one a line (default: gate_log.jsonl by CHECKPOINT)")
    add(
        "--classifier", choices=("lower", "block", "off"),
        help="of train-classifier: lower what it fears, end the text there, or leave it out; the policy stays "
        "(default: lower, where CHECKPOINT has one)",
    )  # fmt: skip
    add("--log-text", action="store_true", help="write the text before an intervention too (default: never any text)")

    add = parser.add_argument_group("model").add_argument
    add("--thinking-steps", type=integer(0), metavar="K", help="passes of the reasoning block (default: as trained)")
    add(
        "--halt", type=number("a number above 0 and up to 1", lambda x: 0 < x <= 1), metavar="P",
        help="stop thinking early at halting probability P (default: think all steps)",
    )  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA when there is one (default)")
    add("--threads", type=integer(1, 1024), metavar="N", help="CPU threads (default: PyTorch's choice)")
    options = parser.parse_args(argv)
    if options.memory is not None and not options.chat:
        parser.error(f"--memory {options.memory!r}: accepted with --chat only")
    if options.chat and options.batch != 1:
        parser.error(f"--batch {options.batch}: accepted with --chat is 1")
    if options.chat and options.prompt == "-":
        parser.error("--prompt -: accepted with --chat is a text, for stdin is what is answered")
    return options


def read_prompt(options: argparse.Namespace) -> bytes:
    """The prompt's bytes as they are, whatever the locale."""
    if options.prompt_file is not None:
        try:
            return Path(options.prompt_file).read_bytes()
        except OSError as error:
            fail(f"--prompt-file {options.prompt_file!r}: {error.strerror}; accepted is a readable file", 2)
    if options.prompt is not None and options.prompt != "-":
        return os.fsencode(options.prompt)
    if options.prompt is None and (options.chat or sys.stdin is None or sys.stdin.isatty()):
        return b""
    return sys.stdin.buffer.read()


def load_gate(options: argparse.Namespace):
    """(the policy, compiled once so that its errors come first; the log, or None for the checkpoint's folder)."""
    from model.genesis.gate.automaton import compile_policy
    from model.genesis.gate.byte_gate import GateLog
    from model.genesis.gate.policy import load_policy

    only = [] if options.policy_only is None else [options.policy_only]
    try:
        policy = load_policy(*only, *options.policy, default=not only)
        compile_policy(policy)
    except ValueError as error:
        fail(str(error), 2)
    if options.gate_log is None:
        return policy, None
    try:
        open(options.gate_log, "ab").close()
    except OSError as error:
        fail(f"--gate-log {options.gate_log!r}: {error.strerror}; accepted is a file that can be written", 2)
    return policy, GateLog(options.gate_log, with_text=options.log_text)


def load(options: argparse.Namespace):
    """(the model on its device, its file)."""
    import torch  # only now: --help and a bad argument answer at once

    from model.training.checkpoint import CheckpointError, find_checkpoint, load_checkpoint

    if options.device == "cuda" and not torch.cuda.is_available():
        fail("--device 'cuda': no CUDA device is available here; accepted are auto, cpu", 2)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    try:
        path = find_checkpoint(options.checkpoint)
        return load_checkpoint(path, device), Path(path)
    except CheckpointError as error:
        fail(str(error), 2)


def load_classifier(options: argparse.Namespace, model, path: Path):
    """The classifier beside the checkpoint, or None where there is none or it is off."""
    from model.genesis.gate.classifier import HiddenStateGate, gate_path

    beside = gate_path(path)
    if options.classifier == "off" or (options.classifier is None and not beside.exists()):
        return None
    try:
        return HiddenStateGate.load(beside, model)
    except ValueError as error:
        fail(f"{error}, or take --classifier off", 2)


def print_in_order(pieces: Iterator, samples: int, prompt: bytes) -> tuple[int, int]:
    """Print the samples whole and in order, each piece as soon as its turn has come.

    Returns:
        Bytes generated, and how many samples the classifier has ended.
    """
    from model.inference.text import Utf8Emitter

    emitters = [Utf8Emitter(prompt) for _ in range(samples)]
    waiting, finished = [""] * samples, [False] * samples
    current = generated = blocked = 0

    def header() -> None:
        if samples > 1:
            print(f"--- sample {current + 1} of {samples} ---", file=sys.stderr, flush=True)

    header()
    for piece in pieces:
        generated += len(piece.data)
        waiting[piece.row] += emitters[piece.row].feed(piece.data)
        finished[piece.row] = piece.finished is not None
        blocked += piece.finished == "gate"
        while current < samples:
            write(waiting[current])
            waiting[current] = ""
            if not finished[current]:
                break
            if samples > 1 or sys.stdout.isatty():
                write("\n")
            current += 1
            if current < samples:
                header()
    return generated, blocked


def write(text: str) -> None:
    """UTF-8 to stdout, now, whatever the locale."""
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()


def run(options: argparse.Namespace) -> None:
    prompt = read_prompt(options)
    policy, log = load_gate(options)
    model, path = load(options)
    classifier = load_classifier(options, model, path)
    from model.genesis.gate.byte_gate import GateLog

    log = log or GateLog(path.parent / "gate_log.jsonl", with_text=options.log_text)
    settings = {
        "max_bytes": options.max_bytes, "temperature": options.temperature, "top_k": options.top_k,
        "top_p": options.top_p, "seed": secrets.randbits(32) if options.seed is None else options.seed,
        "stop": options.stop, "thinking_steps": options.thinking_steps, "halt_threshold": options.halt,
        "any_bytes": options.any_bytes, "policy": policy, "log": log, "classifier": classifier,
        "classifier_mode": "block" if options.classifier == "block" else "lower",
    }  # fmt: skip
    try:
        (hold_chat if options.chat else continue_prompt)(options, model, prompt, settings)
    except FloatingPointError as error:
        fail(f"checkpoint {options.checkpoint}: {error}", 1)
    if log.failure and options.gate_log:
        fail(f"--gate-log {options.gate_log!r}: {log.failure.strerror}; not all interventions are in it", 1)


def continue_prompt(options: argparse.Namespace, model, prompt: bytes, settings: dict) -> None:
    from model.inference.generate import generate

    started = time.perf_counter()
    pieces = generate(model, prompt, batch=options.batch, **settings)
    read = time.perf_counter()
    generated, blocked = print_in_order(pieces, options.batch, prompt)
    reading, writing = max(read - started, 1e-9), max(time.perf_counter() - read, 1e-9)
    # On a terminal the text has ended its line; in a pipe or file stdout holds the text and nothing else.
    print(
        f"generated {generated:,} bytes at {generated / writing:,.0f} bytes/s; "
        f"prompt {len(prompt):,} bytes at {len(prompt) / reading:,.0f} bytes/s; seed {settings['seed']}"
        f"{interventions(settings['log'])}"
        + (f"; ended by the classifier: {blocked} of {options.batch}" if blocked else ""),
        file=sys.stderr,
    )


def hold_chat(options: argparse.Namespace, model, preamble: bytes, settings: dict) -> None:
    from model.inference.chat import Chat, Conversation

    conversation = Conversation(model, preamble=preamble, **settings)
    with contextlib.ExitStack() as opened:
        memory = open_memory(options.memory, opened) if options.memory is not None else None
        Chat(conversation, line_reader(), write, lambda text: print(text, file=sys.stderr, flush=True), memory).run()
    print(
        f"{conversation.replies:,} replies, {conversation.generated:,} bytes; seed {settings['seed']}"
        f"{interventions(settings['log'])}",
        file=sys.stderr,
    )


def open_memory(file: str, opened: contextlib.ExitStack):
    """The memory with its router, which is trained where there is none beside it yet; `opened` closes it."""
    from model.sgm.memory import ExternalMemory
    from model.sgm.routed import RoutedMemory
    from model.sgm.router import MemoryRouter

    beside = Path(f"{file}.router.safetensors")
    try:
        memory = opened.enter_context(ExternalMemory(file))
        if not beside.exists():
            print(f"training the memory's router, once, for some seconds: {beside}", file=sys.stderr, flush=True)
        return RoutedMemory(memory, MemoryRouter.load_or_train(beside))
    except (ValueError, OSError) as error:
        fail(f"--memory {file!r}: {error}", 2)


def line_reader() -> Callable[[], str]:
    """How --chat reads its lines: with editing and history on a terminal, as they are from elsewhere."""
    if sys.stdin is None or not (sys.stdin.isatty() and sys.stdout.isatty()):

        def read() -> str:
            line = b"" if sys.stdin is None else sys.stdin.buffer.readline()
            if not line:
                raise EOFError
            return line.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")

        return read

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() uses it once it is there)
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")

    def edit() -> str:
        while True:
            try:
                return input("> ")
            except KeyboardInterrupt:
                print()  # as in a shell: the line is dropped
            except EOFError:
                print()
                raise

    return edit


def interventions(log) -> str:
    """What the gate did, for the last line; nothing when it did nothing."""
    if not log.counts:
        return ""
    counts = ", ".join(f"{category} {count:,}" for category, count in sorted(log.counts.items()))
    where = f"not logged: {log.failure.strerror}" if log.failure else f"logged in {log.path}"
    return f"; gate: {counts}, {where}"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; raises SystemExit for a bad argument or file."""
    options = parse(argv)
    try:
        run(options)
    except KeyboardInterrupt:
        print("\ngenerate.py: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        abandon_stdout()
    except OSError as error:
        abandon_stdout()
        fail(f"stdout: {error.strerror}", 1)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in f"{type(error).__name__} {error}".lower():
            raise
        fail(f"--batch {options.batch}: too little memory; accepted is a smaller batch or another --device", 2)
    return 0


def abandon_stdout() -> None:
    """What is still buffered would raise again when the interpreter flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
