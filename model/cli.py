"""What the scripts share: arguments that fail in one line, and errors that a user can mend told in one.

Imports no PyTorch, so that --help and a mistyped option answer at once.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # as PyTorch says it of a GPU and of a CPU


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it; options are not abbreviated."""

    def __init__(self, **settings):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists what is accepted)\n")


def positive(text: str) -> int:
    """An argparse type: an integer ≥ 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: accepted is an integer ≥ 1")
    return int(text)


def guarded(program: str, run: Callable[[], int]) -> int:
    """`run()`'s exit code; 2 after one line on stderr for an error that a user can mend, 130 for Ctrl-C.

    Those are ValueError, OSError and memory that does not suffice. Others are faults of the program and keep their
    traceback.
    """
    try:
        return run()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split()) or "out of memory"
        if isinstance(error, RuntimeError) and not any(phrase in text for phrase in OUT_OF_MEMORY):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"{program}: error: {text}" + (f" [worker {rank}]" if rank != "0" else ""), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        return 130
