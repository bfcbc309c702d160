"""The kernel that chooses bytes against the constraints, the gate and the sampling that it stands for."""

import os
import random

import pytest
import torch

from model.genesis.gate.automaton import compile_policy
from model.genesis.gate.byte_gate import ByteGate
from model.genesis.gate.policy import Policy, Rule, load_policy
from model.inference.sampling import MASS_ROUNDING, probabilities, sample
from model.inference.text import NEXT, Utf8Constraint
from model.kernels import choose as kernel
from model.kernels.choose import BROKEN, FLAGGED, MUST_NOT_END, Choice, Rules, Sampling, choose

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    kernel.triton is None or (not CUDA and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs the package triton, and a CUDA device or TRITON_INTERPRET=1, which conftest sets where there is none",
)
SLOTS, LEAST = 3, 0.05
RULES = [
    Rule("c", f"{i}", "phrase", text, bool(i % 2)) for i, text in enumerate(["sig", "kus", "fi", "😀a", "ab cd", "a"])
]
POLICIES = {
    "nothing": Policy(),
    "a letter": Policy((Rule("c", "a", "phrase", "a", False),)),
    "half a character": Policy((Rule("c", "x", "phrase", "x\ufffd", False),)),
    "phrases": Policy(tuple(RULES)),
    "phrases and patterns": Policy((*RULES[:5], *load_policy().rules)),
}
PROMPTS = ["sığ değil KU".encode(), "😀".encode()[:3], b"4111 1111 1111 111"]
SETTINGS = {
    "greedy": {"temperature": 0},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 1e-12},
    "top-k": {"temperature": 1.1, "top_k": 40},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "both": {"temperature": 1.3, "top_k": 90, "top_p": 0.8},
    "least": {"temperature": 5.0, "top_p": 1e-9},
}


@pytest.fixture(autouse=True)
def all_others_at_once(monkeypatch):
    if not CUDA:
        monkeypatch.setattr(kernel, "OTHERS", 128)


def text_logits(rng: random.Random, rows: int) -> torch.Tensor:
    """Peaked at bytes that spell the beginnings of matches, with ties between them and everything else."""
    logits = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rng.getrandbits(32))).round(decimals=1)
    for row in range(rows):
        for byte in [*b"a ", *rng.sample("sığkuşfiab cd1 .".encode() + "😀".encode(), 4)]:
            logits[row, byte] += 6
    return logits


class Both:
    """The same rows through the constraints and through the kernel."""

    def __init__(self, policy: str, utf8: bool, settings: dict, seen: bool):
        automaton, self.settings, rows = compile_policy(POLICIES[policy]), settings, len(PROMPTS)
        self.gate = ByteGate(automaton, rows, least_mass=LEAST).read(PROMPTS)
        self.utf8 = Utf8Constraint(PROMPTS)
        self.constraints = [self.utf8, self.gate] if utf8 else [self.gate]
        masks = automaton.masks(DEVICE)
        after, replacement = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (NEXT, automaton.replacement))
        tables = automaton.tables(DEVICE), masks.byte_sets, masks.sets, masks.blocked, replacement
        self.rules = Rules(after if utf8 else None, *tables)
        begin = [torch.as_tensor(each).to(DEVICE) for each in (self.gate._node, self.gate._registers)]
        stuck = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
        self.choice = Choice.begin(self.utf8._states.to(DEVICE), *begin, stuck, SLOTS, LEAST if seen else None)
        # Rows of a larger batch, in another order.
        self.all_rows = rows + 2
        self.index = torch.tensor([4, 1, 3])
        greedy = settings["temperature"] == 0
        top_k, top_p = settings.get("top_k"), settings.get("top_p")
        numbers = [settings["temperature"], top_k or 256, 2.0 if top_p is None else top_p - MASS_ROUNDING]
        self.clocks = torch.zeros(SLOTS, self.all_rows, 256, dtype=torch.float64, device=DEVICE)
        self.sampling = Sampling(
            torch.tensor(numbers, dtype=torch.float64, device=DEVICE), None if greedy else self.clocks,
            self.index.to(DEVICE), bool(top_k or top_p),
        )  # fmt: skip
        self.generators = [torch.Generator().manual_seed(4) for _ in range(2)]

    def step(self, t: int, logits: torch.Tensor) -> tuple[int, int, int]:
        """One byte; how many were blocked in some row, must not end, and were flagged."""
        self.clocks[t % SLOTS] = torch.empty(self.all_rows, 256, dtype=torch.float64).exponential_(
            generator=self.generators[0]
        )
        masked = logits
        where = [torch.as_tensor(each).clone() for each in (self.gate._node, self.gate._registers)]
        for constraint in self.constraints:
            before, masked = masked, constraint.mask(masked)
        every = torch.zeros(self.all_rows, 256).index_copy(0, self.index, masked)
        expected = sample(every, **self.settings, generator=self.generators[1])[self.index]
        flagged = self.gate.flagged()
        for constraint in self.constraints:
            constraint.advance(expected)
        ends = self.gate.must_not_end()
        choose(logits.to(DEVICE), self.rules, self.sampling, self.choice)
        found = self.choice.out[t % SLOTS].cpu()
        assert torch.equal(found & 255, expected) and torch.equal(self.choice.chosen.cpu(), expected)
        assert torch.equal(found & MUST_NOT_END != 0, ends) and (self.choice.step == t + 1).all()
        assert torch.equal(self.choice.node.cpu(), torch.as_tensor(self.gate._node))
        assert torch.equal(self.choice.registers.cpu(), torch.as_tensor(self.gate._registers))
        if len(self.constraints) == 2:
            assert torch.equal(self.choice.utf8.cpu().long(), self.utf8._states)
        if self.choice.seen is None or not where[1].shape[1]:
            assert not (found & FLAGGED).any()
        else:
            assert torch.equal(found & FLAGGED != 0, flagged)
            assert torch.equal(self.choice.seen[t % SLOTS].cpu(), before)
            kept = self.choice.seen_node[t % SLOTS].cpu(), self.choice.seen_registers[t % SLOTS].cpu()
            assert all(torch.equal(a, b) for a, b in zip(kept, where))
        return int((masked != before).any(1).sum()), int(ends.sum()), int(flagged.sum())


CASES = [("phrases", False, "hot"), ("nothing", True, "both"), ("nothing", False, "greedy")]
CASES += [("phrases and patterns", True, settings) for settings in SETTINGS]


@pytest.mark.parametrize(("policy", "utf8", "settings"), CASES)
def test_it_chooses_what_the_constraints_and_the_sampling_do(policy, utf8, settings):
    both, rng = Both(policy, utf8, SETTINGS[settings], seen=settings != "top-k"), random.Random(2)
    steps = 8 if policy == "phrases" else 4
    counts = torch.tensor([both.step(t, text_logits(rng, len(PROMPTS))) for t in range(steps)])
    if policy == "phrases":
        assert (counts.sum(0) > 0).all()  # there was something to block, to hold back and to tell


def test_stuck_rows_are_left_as_they_are():
    both = Both("a letter", False, SETTINGS["greedy"], seen=True)
    both.choice.stuck[1] = True
    logits = torch.zeros(len(PROMPTS), 256)
    logits[:, ord("a")] = 9
    choose(logits.to(DEVICE), both.rules, both.sampling, both.choice)
    found = both.choice.out[0].tolist()
    assert found[1] == ord("a") | MUST_NOT_END and found[2] & 255 != ord("a") and found[2] & FLAGGED
    assert (both.choice.registers >= 0).all()


def test_the_least_rank_is_kept_and_ties_go_to_the_lower_byte():
    both = Both("nothing", False, {"temperature": 1.0, "top_k": 3}, seen=False)
    logits = torch.zeros(len(PROMPTS), 256)
    logits[0, [200, 7, 50]] = torch.tensor([1.0, -torch.inf, 1.0])
    seen = [set() for _ in PROMPTS]
    for t in range(12):
        both.clocks[t % SLOTS] = torch.rand(both.all_rows, 256, generator=torch.Generator().manual_seed(t)) + 1e-3
        choose(logits.to(DEVICE), both.rules, both.sampling, both.choice)
        for row, byte in enumerate(both.choice.chosen.tolist()):
            seen[row].add(byte)
    assert seen[0] == {200, 50, 0} and seen[1] == {0, 1, 2}
    expected = probabilities(logits, top_k=3)
    assert expected[0].nonzero().flatten().tolist() == [0, 50, 200]


@pytest.mark.parametrize("settings", ["greedy", "hot", "both"])
def test_logits_that_are_not_finite(settings):
    """A NaN is a byte that is not drawn; where nothing is left, or all of it is infinite, byte 0 is, and marked."""
    both = Both("phrases", True, SETTINGS[settings], seen=True)
    both.clocks.fill_(1.0)
    logits = torch.full((len(PROMPTS), 256), torch.nan)
    logits[0, [ord("q"), ord("u")]] = torch.tensor([40.0, 0.0])
    logits[2, ord("q")] = torch.inf
    choose(logits.to(DEVICE), both.rules, both.sampling, both.choice)
    codes = both.choice.out[0].cpu()
    assert (codes & 255).tolist() == [ord("q"), 0, 0] and (codes & BROKEN != 0).tolist() == [False, True, True]
    assert both.choice.chosen.tolist() == [ord("q"), 0, 0] and not (codes & FLAGGED).any()
    # Byte 0 is not valid inside the second row's character.
    assert both.utf8._states[1] > 0 and (both.choice.utf8 >= 0).all() and (both.choice.registers >= 0).all()


def peaked(byte: int) -> torch.Tensor:
    logits = torch.zeros(len(PROMPTS), 256)
    logits[:, byte] = 9
    return logits


ENDS = [("phrases", b" a\xc3", [0, 3, 3]), ("half a character", b"x\xc3", [0, 3])]


@pytest.mark.parametrize(("policy", "text", "ends"), ENDS)
def test_what_must_not_end_inside_a_character(policy, text, ends):
    both = Both(policy, False, SETTINGS["greedy"], seen=False)
    assert [both.step(t, peaked(byte))[1] for t, byte in enumerate(text)] == ends and both.choice.node.all()


def test_each_automaton_blocks():
    """One byte for one of several, the next for another."""
    both = Both("phrases and patterns", False, SETTINGS["greedy"], seen=True)
    assert both.rules.automaton.columns.shape[0] > 1
    assert both.step(0, peaked(ord("1"))) == (1, 0, 1)
    counts = [both.step(1 + t, peaked(byte)) for t, byte in enumerate(b"sig")]
    assert [blocked for blocked, _, _ in counts] == [0, 0, 3]
