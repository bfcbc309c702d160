"""Fixtures for all tests: tiny models whose every weight matters, one thread, and no cache but the test's own."""

import contextlib
import functools
import os
import sys
import traceback
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


def draw_nothing_on_meta() -> None:
    """A checkpoint's model is made on the meta device first, where drawing weights gives none: PyTorch goes through
    what each draw would be in Python, which is most of what loading a tiny model takes."""

    def shaped(draw):
        @functools.wraps(draw)
        def drawn(tensor, *args, **settings):
            return tensor if tensor.is_meta else draw(tensor, *args, **settings)

        return drawn

    for name in ("normal_", "uniform_", "kaiming_uniform_"):
        setattr(torch.nn.init, name, shaped(getattr(torch.nn.init, name)))


draw_nothing_on_meta()


def pytest_configure(config) -> None:
    """Where there are several workers each of them would rewrite the assertions of all test files, some ten seconds in
    a fresh clone: each writes the byte code of its share, and reads what the others have written."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if count > 1 and not sys.dont_write_bytecode:
        with contextlib.suppress(ImportError, AttributeError, TypeError, OSError):  # another version's rewriting
            rewrite_share(config, int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")), count)


def rewrite_share(config, index: int, count: int) -> None:
    from _pytest.assertion import rewrite

    state = config.stash[rewrite.assertstate_key]
    places = [config.invocation_params.dir / arg.partition("::")[0] for arg in config.args]
    files = [file for place in places for file in (place.rglob("test_*.py") if place.is_dir() else [place])]
    for file in sorted(files, key=lambda file: (-file.stat().st_size, file))[index::count]:
        folder = rewrite.get_cache_dir(file)
        cached = folder / f"{file.stem}{rewrite.PYC_TAIL}"
        if rewrite.try_makedirs(folder) and rewrite._read_pyc(file, cached) is None:
            status, code = rewrite._rewrite_test(file, config)
            rewrite._write_pyc(state, code, status, cached)


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
            traceback.print_exception(error, file=sys.__stderr__)
            sys.__stderr__.flush()
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
def light_model(tiny_model) -> AGIFormer:
    """For what hangs on bytes being written and not on what writes them: less than half of `tiny_model()`'s time."""
    return tiny_model(n_layers=1, thinking_steps=2, recall_heads=0)


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
