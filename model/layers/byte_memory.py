"""ByteMemory: fast weights over bytes, from a context to the bytes that followed it; always in float32.

The blocks' fast weights see patches, and a text repeats itself at any byte: what stood at one place of a patch comes
back at another. Here every byte's context is the state of the byte head before it, wherever in its patch it stands.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import hebbian
from model.kernels.float32_linear import float32_linear, splits
from model.layers.norm import NORM_EPS, rms_norm

BEGIN = 256  # stands for "no byte yet" at the very start of a text


@dataclass
class ByteMemoryState:
    """What a stream goes on from, N being the span.

    Attributes:
        M, z: the fast weights [B, H, K, E] and their normaliser [B, H, K].
        keys: [B, H, N, K] of the contexts before the last N bytes; 0 where there is none.
        bytes: [B, N − 1] the bytes before the last one, BEGIN where there is none.
        reads: [B, N − 1, H · E] of the contexts before them.
    """

    M: Tensor
    z: Tensor
    keys: Tensor
    bytes: Tensor
    reads: Tensor

    def clone(self) -> "ByteMemoryState":
        return ByteMemoryState(*(tensor.clone() for tensor in self.tensors()))

    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        return [getattr(self, field.name) for field in fields(self)]


class ByteMemory(nn.Module):
    """Associates each context with the N bytes that followed it, and votes for what followed the like of this one.

    With h_t the head's state that predicts byte t, and v_j an embedding of a byte for each place j of a span::

        write   key(h_{t−N}) → Σ_j v_j(x_{t−N+j}) / √N     with strength β(h_t) in [0, 1], once byte t − 1 is read
        read    r_t = query(h_t) M
        vote    Σ_j W_j r_{t−j}                            → logits of byte t, j = 0 … N − 1

    A cache of contexts and what followed them (Grave et al. 2017), of fixed size, as fast weights (Schlag et al. 2021)
    under the delta rule: the last value of a key counts. Keys and queries begin as the same projection, so that
    a context recalls its like before anything has been learned. A span is written at once, so that a fact takes one
    key and not one for each of its bytes, and its later bytes follow from the question and not from each other.

    Nothing decays: what is there stays until something else is written over it, and plasticity, which shortens the
    blocks' memories, does not reach this one. So all depends on writing little. β reaches exactly 0 and 1,
    and is steep where it does (a stretched sigmoid, as in Louizos et al. 2018): what is not written cannot wear off
    what was, over any distance. A price on β in training (`TrainingStep.write_price`) makes it choose.
    Where β is 0 it has no gradient: a gate that has shut everywhere stays shut.

    Text heads write for nothing: what helps to predict the text at hand has a place of its own, and is not bought with
    the space of facts. In training nothing that a task tells or asks is written into them (`told`): they would answer
    near questions, and the heads for facts, whose writing costs, would shut before there is anything far to recall.
    They are read there as elsewhere, so that they learn to be silent where a fact is asked for.

    Keys are wider than values. Each write under the delta rule takes 1/K of what was written under an unlike key, so K
    says how many writes later a fact is still there; what was written has to be told from 256 bytes only, and M is of
    K · E values: one head of 256 × 64 costs what four of 64 × 64 do.

    Args:
        head_dim: width of h.
        heads, dim, key_dim: H, E (of values) and K (of keys).
        rule: "delta" or "hebbian", as in `HebbianMemory`.
        span: N.
        text: more heads, whose writing is free.
    """

    STRETCH = 0.25  # β = clip((1 + 2 s) sigmoid − s, 0, 1)

    def __init__(self, head_dim: int, heads: int, dim: int, key_dim: int, rule: str, span: int, text: int = 0):
        super().__init__()
        self.heads, self.facts, self.rule, self.span = heads + text, heads, rule, span
        heads += text
        self.queries = nn.Linear(head_dim, heads * key_dim, bias=False)
        self.keys = nn.Linear(head_dim, heads * key_dim, bias=False)
        self.values = nn.Embedding(257 * span, heads * dim)  # place j of a span: from row 257 j on; BEGIN has a row
        self.gates = nn.Linear(head_dim, 2 * heads)  # writing strength, reading strength
        self.output = nn.Linear(span * heads * dim, 256, bias=False)

    @torch.no_grad()
    def reset(self) -> None:
        """Keys are queries; nothing is said yet; half strength."""
        self.keys.weight.copy_(self.queries.weight)
        self.output.weight.zero_()
        self.gates.weight.zero_()
        self.gates.bias.zero_()

    def forward(
        self,
        hidden: Tensor,
        previous: Tensor,
        state: ByteMemoryState | None = None,
        writes: list[Tensor] | None = None,
        told: Tensor | None = None,
        impl: str = "auto",
    ) -> tuple[Tensor, ByteMemoryState]:
        """One read for every byte, and the writes that lie before it.

        Args:
            hidden: [B, L, head_dim], states that predict each byte, of any float type; L ≥ 1.
            previous: [B, L] the byte before each, BEGIN for none.
            writes: if given, the writing strengths β [B, heads, L] of the heads for facts are appended to it.
            told: [B, L] bool, bytes of which text heads write nothing down; None in all but training.

        Returns:
            What is added to the logits [B, L, 256], and the state; float32, or float64 for a float64 model.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            L, N = hidden.shape[1], self.span
            q, k, gates = self._projections(hidden)
            q, k = self._heads(q), self._heads(k)
            write, read = gates.transpose(1, 2).split(self.heads, 1)
            beta = ((1 + 2 * self.STRETCH) * write.sigmoid() - self.STRETCH).clamp(0, 1)
            if writes is not None:
                writes.append(beta[:, : self.facts])
            if told is not None and self.heads > self.facts:
                of_text = torch.arange(self.heads, device=beta.device) >= self.facts
                beta = beta.masked_fill(self._spans_with(told)[:, None] & of_text[:, None], 0)
            if self.rule == "delta":
                q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            else:
                q, k = F.elu(q) + 1, F.elu(k) + 1
            state = self._begin(k, previous) if state is None else state
            keys = torch.cat([state.keys, k], 2)
            seen = torch.cat([state.bytes, previous.long()], 1)
            # What is written at a byte is the context before the span that ends with the byte before it.
            written, v = keys[:, :, :L], self._heads(self._values(seen, L, dtype))
            log_decay = torch.zeros_like(beta)
            if self.rule == "hebbian":
                written, beta = written * beta.unsqueeze(-1), None
            out, (M, z) = hebbian(q, written, v, log_decay, beta=beta, state=(state.M, state.z), impl=impl)
            out = (out * (2 * read.sigmoid()).unsqueeze(-1)).transpose(1, 2).flatten(2)
            reads = torch.cat([state.reads, out], 1)
            spans = torch.cat([reads[:, N - 1 - j : N - 1 - j + L] for j in range(N)], -1)
            logits = float32_linear(spans, self.output.weight)
            return logits, ByteMemoryState(M, z, keys[:, :, L:], seen[:, L:], reads[:, L:])

    def _spans_with(self, marked: Tensor) -> Tensor:
        """[B, L] bool: whether one of the N bytes before each is marked, which are what is written there."""
        return F.pad(marked[:, :-1], (self.span, 0)).unfold(1, self.span, 1).any(-1)

    def _begin(self, k: Tensor, previous: Tensor) -> ByteMemoryState:
        """The state before a text whose keys are k [B, H, L, K]: nothing has been read or written."""
        (B, H, _, K), N, E = k.shape, self.span, self.values.embedding_dim // self.heads
        return ByteMemoryState(
            k.new_zeros(B, H, K, E),
            k.new_zeros(B, H, K),
            k.new_zeros(B, H, N, K),
            torch.full_like(previous[:, :1], BEGIN, dtype=torch.long).expand(B, N - 1),
            k.new_zeros(B, N - 1, H * E),
        )

    def _projections(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, L, head_dim] → queries and keys [B, L, H · K], gates [B, L, 2 · H] of its norm."""
        bias = self.gates.bias
        if not splits(hidden, self.queries.weight):
            h = rms_norm(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))
            projected = (float32_linear(h, linear.weight) for linear in (self.queries, self.keys))
            return *projected, float32_linear(h, self.gates.weight, bias)
        # The norm is one factor of a row: after the product, which tensor cores can take of a bfloat16 hidden as it is.
        weights = [self.queries.weight, self.keys.weight, self.gates.weight]
        rows = [len(weight) for weight in weights]
        padding = bias.new_zeros(-sum(rows) % 8, hidden.shape[-1])
        square = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=bias.dtype).square()
        scale = (square / hidden.shape[-1] + NORM_EPS).rsqrt()
        projected = float32_linear(hidden, torch.cat([*weights, padding])) * scale
        q, k, gates, _ = projected.split([*rows, len(padding)], -1)
        return q, k, gates + bias

    def _values(self, seen: Tensor, L: int, dtype: torch.dtype) -> Tensor:
        """Bytes [B, N − 1 + L] → what each span of N of them is written as, [B, L, H · E]."""
        table, N = self.values.weight.to(dtype), self.span
        return sum(F.embedding(seen[:, j : j + L] + 257 * j, table) for j in range(N)) / N**0.5

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, H · width] → [B, H, L, width]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
