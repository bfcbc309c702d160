"""Fixtures for all tests: tiny models whose every weight matters, one thread, and no cache but the test's own."""

import os
import sys
from pathlib import Path

import pytest
import torch

# Without a card Triton's kernels are tested in its interpreter, which has to be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from model import AGIFormer, AGIFormerConfig


def patch_once_a_launch() -> None:
    """Triton's interpreter exchanges the language's functions for its own at a launch, which is meant, and again at
    every call of a function inside a kernel: a third of its time, for nothing."""
    try:
        from triton.runtime import interpreter

        exchange, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    except (ImportError, AttributeError):  # without triton, or with another version's interpreter
        return
    done = set()  # namespaces seen in this launch: what is exchanged depends on nothing else

    def once(function):
        if id(function.__globals__) in done:
            return None  # of a call inside a kernel, which does not use it
        done.add(id(function.__globals__))
        return exchange(function)

    def launched(*args, **kwargs):
        done.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_once_a_launch()

TINY = {
    "d_model": 32, "n_layers": 2, "n_heads": 2, "byte_dim": 16, "window": 8, "ffn_dim": 48, "reasoning_dim": 48,
    "head_dim": 32, "recall_heads": 2, "recall_dim": 8, "recall_key_dim": 8, "recall_span": 3,
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that share a few busy cores make tensors this small many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fork(work) -> int:
    """The process id of a fork that does `work()`; 0 is its exit status when that came to its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"child: {error!r}", file=sys.__stderr__, flush=True)
        finally:
            os._exit(code)
    return pid


def make_random_model(seed: int = 5, **changes) -> AGIFormer:
    """A new model's residual branches, gates and output are zero: here all are drawn, so that all parts count.

    A grown one is made with `growth=(...)`: what grew is drawn too.
    """
    model = AGIFormer(AGIFormerConfig(**(TINY | changes)))
    draw_weights(model, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def draw_weights(model: AGIFormer, generator: torch.Generator) -> None:
    """Draw every matrix of a model, its start and its mixers' amounts."""
    for name, parameter in model.named_parameters():
        if name.endswith("down"):  # [petals, width, D]: all petals are summed
            parameter.normal_(std=parameter[..., 0].numel() ** -0.5, generator=generator)
        elif parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("start"):
            parameter.normal_(generator=generator)
        elif name.endswith("amount"):  # of a mixer, in [0, 1]
            parameter.uniform_(0.2, 0.8, generator=generator)


@pytest.fixture(scope="session")
def tiny_model():
    """make(**config changes) → a model in eval mode whose matrices are all random; made once for equal changes."""
    made = {}

    def make(**changes) -> AGIFormer:
        key = tuple(sorted(changes.items()))
        if key not in made:
            made[key] = make_random_model(**changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def router_file(tmp_path_factory) -> Path:
    """A memory's router, trained once for all processes of a run; to be read, or copied, only."""
    import fcntl

    from model.sgm.router import MemoryRouter

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a folder of its own in that of the run
        folder = folder.parent
    with open(folder / "router.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        MemoryRouter.load_or_train(folder / "router.safetensors")
    return folder / "router.safetensors"
