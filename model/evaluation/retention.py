"""What was kept while more was learned: the matrix of every stage's BPC after every stage."""

import math
from dataclasses import dataclass
from typing import Any

from model.evaluation.report import number, text_table


@dataclass(frozen=True)
class Retention:
    """BPC by row (after which stage) and column (on which stage's validation text).

    Attributes:
        after: [R] stage names, one a row.
        stages: [C] stage names, one a column.
        matrix: [R][C] BPC in bits per byte; None where it was not measured or not finite.
        forgetting: by stage, BPC at the end minus the best so far, in bits per byte, ≥ 0; None where the last row
            has no value.
    """

    after: list[str]
    stages: list[str]
    matrix: list[list[float | None]]
    forgetting: dict[str, float | None]

    def table(self) -> str:
        """The matrix and, under it, the forgetting, as text."""
        rows = [[name, *(number(value) for value in row)] for name, row in zip(self.after, self.matrix)]
        rows.append(["forgotten", *(number(self.forgetting[stage]) for stage in self.stages)])
        return text_table(["after \\ BPC on", *self.stages], rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a metrics file."""
        return {
            "after": self.after,
            "stages": self.stages,
            "matrix": self.matrix,
            "forgetting": self.forgetting,
        }


def retention_matrix(rows: list[dict[str, Any]]) -> Retention:
    """The retention matrix of evaluations in the order in which they were made.

    Args:
        rows: one entry after each stage: {"after": stage name, "bpc": {stage name: bits per byte or None}}. Columns
            stand in the order in which stages first appear.

    Raises:
        ValueError: when there are no rows or one lacks its fields, naming row, value and what is accepted.
    """
    if not rows:
        raise ValueError(f"rows={rows!r}: accepted are one or more evaluations")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("after"), str) or not isinstance(row.get("bpc"), dict):
            raise ValueError(f'rows[{i}]={row!r}: accepted is {{"after": stage, "bpc": {{stage: bits per byte}}}}')
    stages = list(dict.fromkeys(stage for row in rows for stage in row["bpc"]))
    matrix = [[_measured(row["bpc"].get(stage)) for stage in stages] for row in rows]
    forgetting = {stage: _forgotten(column) for stage, column in zip(stages, zip(*matrix))}
    return Retention([row["after"] for row in rows], stages, matrix, forgetting)


def _measured(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _forgotten(column: tuple[float | None, ...]) -> float | None:
    end = column[-1]
    return None if end is None else end - min(value for value in column if value is not None)
