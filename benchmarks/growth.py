"""What growth costs: parameters, training step and inference by the depth of every block of blocks.

    python benchmarks/growth.py --preset small --depths 0,1,2,3

Times are medians; the training step is captured as one CUDA graph where there is CUDA, and includes the optimizer.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.agiformer import AGIFormer
from model.cli import Parser, guarded
from model.config import AGIFormerConfig
from model.evaluation.report import text_table
from model.inference.stream import ByteStream
from model.training.distributed import join_workers
from model.training.optimizer import MuonAdamW
from model.training.step import EAGER_STEPS, TrainingStep

REPEATS = 10


def median_seconds(run, device: torch.device, warmup: int = 2) -> float:
    """Median time of one call, the device's work included."""
    times = []
    for i in range(warmup + REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= warmup:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(depth: int, thawed: bool, arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """One row: a model grown `depth` times, its left trees frozen or thawed."""
    torch.manual_seed(0)
    model = AGIFormer(AGIFormerConfig.preset(arguments.preset)).to(device)
    for _ in range(depth):
        model.grow()
    if thawed:
        model.thaw()
    bytes_per_step = arguments.batch_size * arguments.seq_len
    x = torch.randint(0, 256, (arguments.batch_size, arguments.seq_len), dtype=torch.uint8)
    amp = torch.bfloat16 if device.type == "cuda" else None
    step = TrainingStep(model, MuonAdamW(model), amp_dtype=amp, graph=True)
    batch = x.pin_memory() if device.type == "cuda" else x
    train = median_seconds(lambda: step.run(batch), device, warmup=EAGER_STEPS + 2)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.eval()
    x = x.to(device)

    @torch.no_grad()
    def forward() -> None:
        with torch.autocast(device.type, amp, enabled=amp is not None):
            model(x)

    infer = median_seconds(forward, device)
    stream = ByteStream(model, 1)
    text = torch.randint(0, 256, (1, 64), device=device)
    streamed = median_seconds(lambda: [stream.feed(text[:, i : i + 1]) for i in range(64)], device, warmup=1)
    return [
        str(depth),
        str(2**depth),
        "thawed" if thawed else "frozen",
        f"{model.parameter_count() / 1e6:.2f}",
        f"{trainable / 1e6:.2f}",
        f"{train / bytes_per_step * 1e9:.0f}",
        f"{infer / bytes_per_step * 1e9:.0f}",
        f"{streamed / 64 * 1e6:.0f}",
    ]


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="small", help="nano, small, base or large (default: small)")
    parser.add_argument("--depths", default="0,1,2,3", help="comma-separated (default: 0,1,2,3)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences (default: 16)")
    parser.add_argument("--seq-len", type=int, default=1024, help="bytes (default: 1024)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    arguments = parser.parse_args()
    if not all(depth.isdecimal() for depth in arguments.depths.split(",")):
        parser.error(f"--depths {arguments.depths}: accepted are integers ≥ 0, comma-separated")
    return guarded("growth.py", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    _, device = join_workers(arguments.device)
    rows = []
    for depth in (int(depth) for depth in arguments.depths.split(",")):
        for thawed in (False, True) if depth else (True,):
            rows.append(measure(depth, thawed, arguments, device))
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    columns = ["depth", "leaves", "left trees", "M parameters", "M learning", "training ns/byte", "forward ns/byte"]
    print(text_table([*columns, "streaming us/byte"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
