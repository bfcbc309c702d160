"""What the benchmarks of speed share: the machine's name, times, peak memory, rows that fail, and the report.

Notable: on CUDA times lie between events on the device's stream, so that the host runs ahead as it does in use; else
they are the host's. A row that does not fit into memory, or that fails, says so in its last column, and the others go
on; every row is written as soon as it is there.
"""

import argparse
import contextlib
import gc
import math
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from model.cli import OUT_OF_MEMORY, Parser, positive
from model.config import AGIFormerConfig
from model.evaluation.report import json_text, number, text_table
from model.files import write_atomically
from model.training.distributed import join_workers

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]  # title → a row's cell

# What --quick makes of a preset, before --set.
TINY = ["d_model=32", "n_layers=1", "n_heads=2", "byte_dim=16", "window=8", "ffn_dim=48", "reasoning_dim=48"]
TINY += ["head_dim=32"]

now = time.perf_counter  # the host's clock


# ── arguments ────────────────────────────────────────────────────────────────────────────────────────────────────


def several(text: str) -> tuple[int, ...]:
    """An argparse type: integers ≥ 1, separated by commas."""
    return tuple(positive(part.strip()) for part in text.split(","))


def add_arguments(parser: Parser) -> None:
    """The options that all of them have."""
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: PyTorch's choice; 1 with --quick)")
    add("--repeats", type=positive, metavar="N", help="that medians and quartiles are taken over")
    add("--quick", action="store_true", help="small sizes for whatever is not given: to see that all of it runs")
    add("--json", metavar="FILE", help="write machine, settings and all numbers there too, after every row")


def read_arguments(
    parser: Parser, argv: list[str] | None, defaults: dict[str, Any], quick: dict[str, Any]
) -> argparse.Namespace:
    """The parser's options and those that all of them have; what was not given as `defaults`, or `quick`, say."""
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    fill_in(arguments, quick if arguments.quick else defaults)
    return arguments


def fill_in(arguments: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Give what was not given its default."""
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def chosen(option: str, given: str, accepted: list[str]) -> list[str]:
    """The names in a comma-separated list, each once. Raises ValueError naming the first that is not accepted."""
    names = list(dict.fromkeys(part.strip() for part in given.split(",")))
    if unknown := [name for name in names if name not in accepted]:
        raise ValueError(f"{option} {unknown[0]}: accepted are {', '.join(accepted)}")
    return names


def model_config(arguments: argparse.Namespace, device: torch.device) -> AGIFormerConfig:
    """What `--preset` and `--set` say, the preset made tiny by --quick; notes the preset that it is."""
    if arguments.preset is None:
        arguments.preset = "small" if device.type == "cuda" and not arguments.quick else "nano"
    config = AGIFormerConfig.preset(arguments.preset)
    return config.with_settings(TINY if arguments.quick else []).with_settings(arguments.set)


def model_name(arguments: argparse.Namespace) -> str:
    """The same for a reader."""
    return " ".join([arguments.preset, *(["made tiny"] if arguments.quick else []), *arguments.set])


def set_up(arguments: argparse.Namespace) -> torch.device:
    """The device, with the threads that were asked for. Raises ValueError for what this machine cannot do."""
    workers, device = join_workers(arguments.device)
    if workers.size > 1:
        raise ValueError(f"{workers.size} workers: accepted is one, without torchrun")
    if arguments.json and Path(arguments.json).is_dir():
        raise ValueError(f"--json {arguments.json}: it is a folder; accepted is a file")
    if arguments.threads or arguments.quick:
        # Threads that share busy cores make small tensors many times slower.
        torch.set_num_threads(arguments.threads or 1)
    return device


# ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────────


def describe(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def cpu_name() -> str:
    """As the system has it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Of an installed package; None where there is none."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def headline(machine: dict[str, Any]) -> str:
    """The machine in a line."""
    parts = [machine["device"], f"{machine['threads']} threads of {machine['cores']} cores"]
    parts += [f"{name} {machine[name]}" for name in ("torch", "triton", "cuda", "cudnn") if machine.get(name)]
    return ", ".join([*parts, f"Python {machine['python']}"])


# ── time and memory ──────────────────────────────────────────────────────────────────────────────────────────────


def seconds(
    run: Callable[[], Any], repeats: int, *, warm_up: int = 0, device: torch.device | None = None
) -> list[float]:
    """Times of `repeats` runs one after another, after `warm_up` that do not count.

    Args:
        device: whose time it is: a CUDA device's by events; else the host's, for work that ends on the host.
    """
    for _ in range(warm_up):
        run()
    cuda = device is not None and device.type == "cuda"
    marks = [_mark(cuda)]
    for _ in range(repeats):
        run()
        marks.append(_mark(cuda))
    if not cuda:
        return [end - start for start, end in pairwise(marks)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairwise(marks)]


def _mark(cuda: bool) -> Any:
    if not cuda:
        return now()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def speeds(amount: float, times: list[float]) -> tuple[float, float, float]:
    """Quartiles of amount a second, by the quartiles of the times that the amount takes."""
    low, median, high = quartiles(times)
    return amount / high, amount / median, amount / low


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def process_seconds() -> float | None:
    """How long this process has been running; None where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def start_peak(device: torch.device) -> None:
    """From here on counts `peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that tensors have taken on a CUDA device; None on a CPU, whose allocator does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def allocated_bytes(device: torch.device) -> int | None:
    """What tensors take on a CUDA device now; None on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


# ── rows that may fail ───────────────────────────────────────────────────────────────────────────────────────────


def attempt(run: Callable[[], Any], optional: bool = False) -> tuple[Any, dict[str, str]]:
    """What `run` returns, and what a row has to say of it.

    Returns:
        The result and {}; or None and {"note": …} where memory did not suffice, {"error": …} where it failed otherwise,
        which is a note too where it is `optional`. In the end nothing that it held is held any more.
    """
    try:
        return run(), {}
    except Exception as error:
        if out_of_memory(error):
            told = {"note": "out of memory"}
        else:
            traceback.print_exc()
            line = next(iter(str(error).strip().splitlines()), "")
            told = {"note" if optional else "error": f"{type(error).__name__}: {line}"[:200]}
    release()
    return None, told


def out_of_memory(error: BaseException | None) -> bool:
    """Whether it, or what it came of, is that memory did not suffice (a failed capture is told of its end)."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or any(phrase in text for phrase in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def release() -> None:
    """Give memory back that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # after a fault every call fails
            torch.cuda.empty_cache()


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────


class Report:
    """Rows as they come: each at once on stderr and in the JSON file, and in the end all of them as a table.

    Args:
        arguments: the settings, `json` among them.
        columns: of the table; a cell of what a row does not have is "-".

    Attributes:
        rows: what the table and the JSON file are made of.
        notes: lines under the table.
        more: what else goes into the JSON file.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device, columns: Columns):
        self.settings, self.columns = vars(arguments), columns
        self.machine = describe(device)
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.more: dict[str, Any] = {}

    def add(self, row: Row) -> None:
        """Take in a row, show it, and write the file."""
        self.rows.append(row)
        print("  ".join(f"{title} {cell}".strip() for title, cell in self._cells(row)), file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """The JSON file, if one was asked for."""
        if self.settings["json"]:
            data = {"machine": self.machine, "settings": self.settings, "rows": self.rows, "notes": self.notes}
            write_atomically(self.settings["json"], json_text(data | self.more).encode())

    def table(self) -> str:
        """All rows."""
        last = [""] if any(self._told(row) for row in self.rows) else []
        rows = [[cell for _, cell in self._cells(row)][: len(self.columns) + len(last)] for row in self.rows]
        return text_table([*self.columns, *last], rows)

    def finish(self) -> int:
        """Print machine, table and notes, and write the file → the exit code: 1 where a row has failed."""
        print("\n".join([headline(self.machine), "", self.table(), *([""] if self.notes else []), *self.notes]))
        self.write()
        return int(any("error" in row for row in self.rows))

    def _cells(self, row: Row) -> Iterator[tuple[str, str]]:
        for title, cell in self.columns.items():
            yield title, cell(row)
        yield "", self._told(row)

    @staticmethod
    def _told(row: Row) -> str:
        return row.get("error") or row.get("note") or ""


def significant(value: float | None, digits: int = 4) -> str:
    """A table's cell: so many significant digits, never an exponent; "-" for what was not measured."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    places = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:.{min(9, max(0, places))}f}"


def text(name: str) -> Callable[[Row], str]:
    """A column of what stands in the rows as it is."""
    return lambda row: "-" if row.get(name) is None else str(row[name])


def cell(name: str, scale: float = 1.0) -> Callable[[Row], str]:
    """A column of a number in the rows, times `scale`."""
    return lambda row: significant(None if row.get(name) is None else row[name] * scale)


def fixed(name: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    """The same with so many digits after the point."""
    return lambda row: number(None if row.get(name) is None else row[name] * scale, digits)


def middle(name: str, scale: float = 1.0) -> Callable[[Row], str]:
    """A column of the median among quartiles in the rows."""
    return lambda row: significant(None if row.get(name) is None else row[name][1] * scale)


def spread(name: str, scale: float = 1.0) -> Callable[[Row], str]:
    """A column of the outer quartiles in the rows: `low–high`."""

    def read(row: Row) -> str:
        return "-" if row.get(name) is None else "–".join(significant(row[name][i] * scale) for i in (0, 2))

    return read
