"""One process a device through torch.distributed: `torchrun --nproc-per-node N train_curriculum.py ...`.

The model is not wrapped: gradients are one flat buffer, averaged by one all-reduce in the training step.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# While one worker encodes a large corpus or evaluates, the others wait.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Workers:
    """This process's place among the workers."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def average_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its mean over the workers, in place; nothing with one worker."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor.div_(self.size)

    def gather(self, tensor: Tensor, device: torch.device) -> list[Tensor]:
        """Every worker's tensor of one shape, by rank, on `device`, which the process group can reach."""
        if self.size == 1:
            return [tensor]
        # As bytes: not every backend has every type.
        tensor = tensor.to(device).contiguous()
        flat = tensor.reshape(-1).view(torch.uint8)
        parts = [torch.empty_like(flat) for _ in range(self.size)]
        dist.all_gather(parts, flat)
        return [part.view(tensor.dtype).view(tensor.shape) for part in parts]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any worker has the flag raised (synchronises; for the control flow between steps)."""
        if self.size == 1:
            return flag
        raised = torch.tensor(float(flag), device=device)
        dist.all_reduce(raised)
        return bool(raised.item())

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()


def join_workers(device: str) -> tuple[Workers, torch.device]:
    """Join the process group that torchrun describes in the environment, if there is one.

    `device` is "auto", "cpu" or "cuda"; returns this process's place and its device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device}: accepted are auto, cpu, cuda")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA device is available; accepted here is cpu")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Workers(), torch.device(device)
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", timeout=PATIENCE)
        return Workers(rank, size), torch.device("cuda", local)
    dist.init_process_group("gloo", timeout=PATIENCE)
    return Workers(rank, size), torch.device("cpu")
