"""What a run reports: a metrics file that is the same for the same run, and a stream of events with the clock.

`metrics_curriculum.json` holds no wall-clock time, so that a resumed run's file equals an unbroken run's byte for byte.
Times and speeds are in `log_curriculum.jsonl`, one JSON object a line, flushed as it is written.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from model.files import write_atomically

METRICS, LOG = "metrics_curriculum.json", "log_curriculum.jsonl"


def finite(value: float) -> float | None:
    """`value`, or None where it is NaN or infinite, which JSON lacks."""
    return value if math.isfinite(value) else None


class Metrics:
    """Training curve, evaluations, and the retention matrix of a run.

    `data` is what the metrics file holds: run {options, config, parameters, workers, amp}, stages [{name, plasticity,
    start, end, seq_len, train_bytes, val_bytes, source (hash)}], train [{step, stage, bpc}], evaluations [{step, stage,
    bpc: {stage: BPC}}], retention [{after, bpc: {stage: BPC}}], best {step, mean, bpc}, skipped_steps, growth [{step,
    why, what, changes, parameters, trainable}], and hulls [{step, radius: {hull: radius}, and where there are such
    router_load, solid, total, steps_to_expansion}].
    """

    def __init__(self, folder: Path, data: dict[str, Any], writes: bool = True):
        self.folder = folder
        self.data = data
        self.writes = writes  # of several workers, one does

    @property
    def path(self) -> Path:
        """The metrics file."""
        return self.folder / METRICS

    def event(self, kind: str, **values: Any) -> None:
        """Append a line to the event stream."""
        if not self.writes:
            return
        line = {"event": kind, "time": round(time.time(), 3), **values}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")

    def write(self) -> None:
        """Write the metrics file, atomically."""
        text = json.dumps(self.data, ensure_ascii=False, indent=1, allow_nan=False)
        write_atomically(self.path, text.encode())
