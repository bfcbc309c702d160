"""What a run reports: a metrics file that is the same for the same run, and a stream of events with the clock.

`metrics_curriculum.json` holds no wall-clock time, so that a resumed run's file equals an unbroken run's byte for byte.
Times and speeds are in `log_curriculum.jsonl`, one JSON object a line, flushed as it is written.
"""

import json
import time
from pathlib import Path
from typing import Any

from model.training.checkpoint import write_atomically


class Metrics:
    """Training curve, evaluations, and the retention matrix of a run.

    `data` is what the metrics file holds: run (options, config), stages [{name, plasticity, start, end, seq_len,
    train_bytes, val_bytes}], train [{step, stage, bpc, lr}], evaluations [{step, stage, bpc: {stage: BPC}}],
    retention [{after, bpc}], best {step, bpc}, skipped_steps.
    """

    def __init__(self, folder: Path, data: dict[str, Any]):
        self.folder = folder
        self.data = data

    @property
    def path(self) -> Path:
        """The metrics file."""
        return self.folder / "metrics_curriculum.json"

    def event(self, kind: str, **values: Any) -> None:
        """Append a line to the event stream."""
        line = {"event": kind, "time": round(time.time(), 3), **values}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log_curriculum.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def write(self) -> None:
        """Write the metrics file, atomically."""
        text = json.dumps(self.data, ensure_ascii=False, indent=1)
        write_atomically(self.path, text.encode())
