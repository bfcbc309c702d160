"""The Hebbian operator against the float64 recurrence: forward, every gradient, carried state, awkward lengths."""

import pytest
import torch
import torch.nn.functional as F

from model.kernels import hebbian

TOLERANCE = 1e-5  # relative, DESIGN: HebbianMemory
RULES = ("hebbian", "delta")
PLASTICITIES = (0.0, 0.1, 0.5, 0.99, 1.0)


def inputs(rule: str, alpha: float, T: int, E: int = 16, B: int = 2, H: int = 2, seed: int = 0, V: int = 0) -> dict:
    """Random float64 arguments with a state, log decays of the form log α + log λ_t; values V wide, or E."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, T, width, generator=g, dtype=torch.float64) for width in (E, E, V or E))
    log_decay = F.logsigmoid(torch.randn(B, H, T, generator=g, dtype=torch.float64) + 4)
    log_decay = log_decay + torch.tensor(alpha, dtype=torch.float64).log()
    M = torch.randn(B, H, E, V or E, generator=g, dtype=torch.float64)
    z = torch.rand(B, H, E, generator=g, dtype=torch.float64) * E
    arguments = {"q": q, "k": k, "v": v, "log_decay": log_decay, "M": M, "z": z}
    if rule == "delta":
        arguments["k"] = F.normalize(k, dim=-1)
        arguments["beta"] = torch.rand(B, H, T, generator=g, dtype=torch.float64)
    else:
        arguments["q"], arguments["k"] = F.elu(q) + 1, F.elu(k) + 1
    return arguments


def run(arguments: dict, impl: str, dtype: torch.dtype, device: str = "cpu") -> tuple[dict, dict]:
    """(outputs, gradients of a random weighting of all outputs) by name, on the CPU."""
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in arguments.items()}
    out, (M, z) = hebbian(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        leaves["log_decay"],
        beta=leaves.get("beta"),
        state=(leaves["M"], leaves["z"]),
        impl=impl,
    )
    outputs = {"out": out, "M": M, "z": z}
    g = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(x.shape, generator=g, dtype=torch.float64) for name, x in outputs.items()}
    total = sum((x * weights[name].to(device, dtype)).sum() for name, x in outputs.items())
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: x.cpu() for name, x in outputs.items()}, {
        name: None if x is None else x.cpu() for name, x in zip(leaves, gradients)
    }


def error(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    size = max(expected.norm().item(), floor)
    difference = (found.double() - expected).norm().item()
    return difference / size if size else difference


def check(rule: str, alpha: float, T: int, device: str, **shape) -> None:
    """The float32 chunked form on `device` against the float64 recurrence, all outputs and all gradients."""
    arguments = inputs(rule, alpha, T, **shape)
    expected, expected_gradients = run(arguments, "recurrent", torch.float64)
    found, gradients = run(arguments, "chunked", torch.float32, device)
    for name in expected:
        assert error(found[name], expected[name]) < TOLERANCE, name
    # At α = 0 the output is v_t whatever q and k are: their exact gradient is of the order of ε, a difference of equal
    # terms. It is held to the same tolerance on the scale of the gradient of v.
    floor = expected_gradients["v"].norm().item() if alpha == 0 else 0.0
    for name, gradient in expected_gradients.items():
        if gradient is None:
            assert gradients[name] is None
        else:
            assert error(gradients[name], gradient, floor) < TOLERANCE, name


@pytest.mark.parametrize("T", [1, 5, 63, 64, 65, 200])
@pytest.mark.parametrize("alpha", PLASTICITIES)
@pytest.mark.parametrize("rule", RULES)
def test_chunked_equals_the_float64_recurrence(rule, alpha, T):
    check(rule, alpha, T, "cpu")


@pytest.mark.parametrize(("rule", "alpha"), [("hebbian", 0.99), ("delta", 0.0), ("delta", 0.5)])
def test_many_chunks_and_a_step(rule, alpha):
    check(rule, alpha, 1025, "cpu", H=1)


@pytest.mark.parametrize(("E", "V"), [(24, 8), (8, 24), (3, 1)])
@pytest.mark.parametrize("rule", RULES)
def test_values_of_another_width_than_keys(rule, E, V):
    check(rule, 0.99, 200, "cpu", E=E, V=V)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("T", [1, 65, 300])
@pytest.mark.parametrize("alpha", PLASTICITIES)
@pytest.mark.parametrize("rule", RULES)
def test_chunked_on_cuda_equals_the_float64_recurrence(rule, alpha, T):
    check(rule, alpha, T, "cuda", E=64)


@pytest.mark.parametrize("rule", RULES)
def test_long_sequences(rule):
    arguments = inputs(rule, 1.0, 8192, E=8, B=1, H=1)
    with torch.no_grad():
        expected, _ = _forward(arguments, "recurrent", torch.float64)
        found, state = _forward(arguments, "chunked", torch.float32)
    assert error(found, expected) < TOLERANCE
    assert torch.isfinite(state[0]).all()


@pytest.mark.parametrize(("rule", "alpha"), [("hebbian", 1.0), ("delta", 1.0)])
def test_gradients_of_a_long_sequence(rule, alpha):
    check(rule, alpha, 2500, "cpu", E=4, B=1, H=1)


def _forward(a: dict, impl: str, dtype: torch.dtype, part: slice = slice(None), state=None):
    state = state or (a["M"].to(dtype), a["z"].to(dtype))
    tensors = [a[name][:, :, part].to(dtype) for name in ("q", "k", "v", "log_decay")]
    beta = a["beta"][:, :, part].to(dtype) if "beta" in a else None
    return hebbian(*tensors, beta=beta, state=state, impl=impl)


@pytest.mark.parametrize("cut", [1, 64, 77, 199])
@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_a_split_with_the_state_carried_is_the_whole(rule, impl, cut):
    arguments = inputs(rule, 0.9, 200)
    whole, (M, z) = _forward(arguments, "recurrent", torch.float64)
    first, state = _forward(arguments, impl, torch.float32, slice(0, cut))
    second, state = _forward(arguments, impl, torch.float32, slice(cut, None), state)
    assert error(torch.cat([first, second], 2), whole) < TOLERANCE
    assert error(state[0], M) < TOLERANCE
    assert error(state[1], z) < TOLERANCE


@pytest.mark.parametrize("rule", RULES)
def test_gradients_agree_with_finite_differences(rule):
    a = inputs(rule, 0.8, 70, E=3, B=1, H=1)
    names = [name for name in a if not (rule == "delta" and name == "z")]

    def function(*tensors):
        x = a | dict(zip(names, tensors))
        out, (M, z) = hebbian(
            x["q"], x["k"], x["v"], x["log_decay"], beta=x.get("beta"), state=(x["M"], x["z"]), impl="chunked"
        )
        return (out, M) if rule == "delta" else (out, M, z)

    assert torch.autograd.gradcheck(function, [a[name].requires_grad_() for name in names], fast_mode=True)


def test_one_erasing_step_in_the_middle():
    """−inf at one step must cut the past off exactly there, with finite gradients everywhere."""
    arguments = inputs("hebbian", 0.9, 100)
    arguments["log_decay"][:, :, 70] = float("-inf")
    expected, expected_gradients = run(arguments, "recurrent", torch.float64)
    found, gradients = run(arguments, "chunked", torch.float32)
    assert error(found["out"], expected["out"]) < TOLERANCE
    for name in ("q", "k", "v", "M", "z"):
        assert error(gradients[name], expected_gradients[name]) < TOLERANCE, name
    assert torch.isfinite(gradients["log_decay"]).all()
    changed = dict(arguments, v=arguments["v"].clone())
    changed["v"][:, :, :70] += 100
    after, _ = _forward(changed, "chunked", torch.float32)
    assert torch.equal(after[:, :, 70:], found["out"][:, :, 70:].detach())


def test_alpha_zero_reads_the_present_and_alpha_one_remembers():
    arguments = inputs("hebbian", 0.0, 90)
    out, _ = _forward(arguments, "chunked", torch.float64)
    torch.testing.assert_close(out, arguments["v"], rtol=1e-5, atol=1e-6)
    arguments = inputs("hebbian", 1.0, 90)
    arguments["log_decay"].zero_()
    _, (M, z) = _forward(arguments, "chunked", torch.float64)
    torch.testing.assert_close(z, arguments["z"] + arguments["k"].sum(2))
    torch.testing.assert_close(M, arguments["M"] + arguments["k"].transpose(-1, -2) @ arguments["v"])


def test_strong_decay_neither_overflows_nor_is_clamped():
    """exp(−cumulative log decay) would overflow after 38 patches at α = 0.1; here 5000 of them at 0.01."""
    arguments = inputs("hebbian", 0.01, 5000, E=8, B=1, H=1)
    expected, _ = _forward(arguments, "recurrent", torch.float64)
    found, _ = _forward(arguments, "chunked", torch.float32)
    assert error(found, expected) < TOLERANCE


def test_an_empty_memory_reads_zero():
    q = torch.rand(1, 1, 3, 4)
    out, _ = hebbian(q, torch.zeros_like(q), torch.rand_like(q), torch.zeros(1, 1, 3), impl="chunked")
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_in_and_float32_goes_out_under_autocast(dtype):
    a = inputs("hebbian", 0.5, 70)
    with torch.autocast("cpu", torch.bfloat16):
        out, (M, z) = hebbian(*(a[name].to(dtype) for name in ("q", "k", "v", "log_decay")), impl="chunked")
    assert out.dtype == M.dtype == z.dtype == torch.float32
    rounded = {name: a[name].to(dtype).double() for name in ("q", "k", "v", "log_decay")}
    expected, _ = hebbian(*rounded.values(), impl="recurrent")
    assert error(out, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "magic"}, "impl='magic'"),
        ({"k": torch.zeros(1, 1, 2, 4)}, "k has shape"),
        ({"log_decay": torch.zeros(1, 1, 2)}, "log_decay has shape"),
        ({"beta": torch.zeros(1, 2, 3)}, "beta has shape"),
        ({"state": (torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4))}, r"state\[0\] has shape"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q = torch.zeros(1, 1, 3, 4)
    arguments = {"q": q, "k": q, "v": q, "log_decay": q[..., 0]} | change
    with pytest.raises(ValueError, match=message):
        hebbian(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", RULES)
def test_auto_takes_the_kernels_where_they_run(rule):
    pytest.importorskip("triton")

    def same(impl, dtype, T, **shape):
        arguments = {name: x.to("cuda") for name, x in inputs(rule, 0.9, T, **shape).items()}
        found, _ = _forward(arguments, "auto", dtype)
        return torch.equal(found, _forward(arguments, impl, dtype)[0])

    assert same("triton", torch.float32, 130) and not same("chunked", torch.float32, 130)
    assert same("chunked", torch.float64, 130)
    assert same("chunked", torch.float32, 63)
    assert same("recurrent", torch.float32, 1)
    assert same("chunked", torch.float32, 130, E=300, B=1, H=1)
