"""Every hyper-parameter of the model, validated, and the presets.

`AGIFormerConfig.preset("small")` is how to get one; `dataclasses.replace` or `--set field=value` changes it.
"""

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

MEMORY_RULES = ("hebbian", "delta")
HULLS = ("convex", "swiglu")
NOT_SET = ("anchors", "growth")  # by --set: they follow from training
# One entry of `growth` for each change of shape since the model was made, in order.
GROWTH = re.compile(r"(grow|thaw) \d+|petals \d+ [1-9]\d*|widen [1-9]\d*")


@dataclass(frozen=True)
class AGIFormerConfig:
    """Shape of an AGIFormer. Widths are in channels, `window` in patches, `patch_size` in bytes.

    Raises:
        ValueError: when a field is out of range, naming field, value and what is accepted.
    """

    d_model: int = 512  # D: width of the patch latents
    n_layers: int = 6  # hybrid blocks
    n_heads: int = 8  # H: heads of attention and of the fast weights; E = d_model / n_heads
    patch_size: int = 4  # P: bytes per patch
    patch_overlap: int = 2  # bytes of the previous patch that a patch also sees
    byte_dim: int = 256  # width of the encoder's byte embedding
    window: int = 128  # patches that attention sees, its own included
    hull: str = "convex"  # kind of the petals of a block's feed-forward layer: "convex" or "swiglu"
    petals: int = 4  # petals of a hull
    ffn_dim: int = 2048  # size of a hull: it has the weights of a two-matrix layer with so many hidden units
    memory_rule: str = "hebbian"  # how the fast weights are written: "hebbian" or "delta"
    thinking_steps: int = 3  # K: passes of the reasoning block; can be set per call
    thinking_skip: int = 0  # in training a row leaves out 0 to this many of the last steps, drawn evenly; at most K
    thinking_reads: bool = False  # whether every step reads the last block's fast weights with a fresh query
    reasoning_dim: int = 2048  # hidden units of the reasoning block's MLP
    head_dim: int = 512  # width of the GRU that writes the bytes of a patch
    recall_heads: int = 0  # heads of the byte head's own fast weights, for facts; 0 is none
    recall_text_heads: int = 0  # more of them, for text: writing into them costs nothing
    recall_dim: int = 64  # width of what such a head writes
    recall_key_dim: int = 256  # width of the keys that it writes at
    recall_span: int = 4  # bytes that such a head writes at once
    recall_rule: str = "delta"  # how they are written: "delta" or "hebbian"
    rope_base: float = 10_000.0  # wavelength scale of the rotary phases, in patches
    plasticity: float = 0.99  # α before a curriculum sets it
    anchors: bool = False  # whether a bias follows every block, moved by GENESIS's amplifier (model.genesis.amplifier)
    growth: tuple[str, ...] = ()  # what grew since: "grow BOB", "thaw BOB", "petals BOB N", "widen D", in order

    def __post_init__(self) -> None:
        for name, low, high in _INTEGER_RANGES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name}={value!r}: accepted is an integer from {low} to {high}")
        for name, low, high in _FLOAT_RANGES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name}={value!r}: accepted is a number from {low} to {high}")
        for name in ("memory_rule", "recall_rule"):
            if getattr(self, name) not in MEMORY_RULES:
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted are {', '.join(MEMORY_RULES)}")
        if self.hull not in HULLS:
            raise ValueError(f"hull={self.hull!r}: accepted are {', '.join(HULLS)}")
        for name in ("anchors", "thinking_reads"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted are True and False")
        if not isinstance(self.growth, tuple | list):
            raise ValueError(f"growth={self.growth!r}: accepted is a list of changes such as 'grow 0'")
        object.__setattr__(self, "growth", tuple(self.growth))  # JSON has lists
        for change in self.growth:
            if not isinstance(change, str) or not GROWTH.fullmatch(change):
                raise ValueError(f"growth {change!r}: accepted are grow BOB, thaw BOB, petals BOB N, widen D_MODEL")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model={self.d_model}: accepted is a multiple of 2 · n_heads = {2 * self.n_heads}, "
                "so that every head has an even width for its rotary pairs"
            )
        if self.thinking_skip > self.thinking_steps:
            raise ValueError(
                f"thinking_skip={self.thinking_skip}: accepted is at most thinking_steps = {self.thinking_steps}"
            )
        if self.patch_overlap > self.patch_size:
            raise ValueError(f"patch_overlap={self.patch_overlap}: accepted is at most patch_size = {self.patch_size}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "AGIFormerConfig":
        """The preset of that name (`nano`, `small`, `base`, `large`) with some fields changed."""
        if name not in PRESETS:
            raise ValueError(f"preset={name!r}: accepted are {', '.join(PRESETS)}")
        return replace(PRESETS[name], **changes)

    def with_settings(self, settings: list[str]) -> "AGIFormerConfig":
        """A copy changed by `field=value` strings, as `--set` takes them."""
        types = {field.name: type(getattr(self, field.name)) for field in fields(self) if field.name not in NOT_SET}
        changes = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals or name not in types:
                raise ValueError(f"--set {setting}: accepted is field=value with a field of {', '.join(types)}")
            try:
                changes[name] = _SWITCH[text.lower()] if types[name] is bool else types[name](text)
            except (KeyError, ValueError):
                accepted = "true and false" if types[name] is bool else f"{types[name].__name__} values"
                raise ValueError(f"--set {setting}: {name} accepts {accepted}") from None
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for checkpoints."""
        return asdict(self) | {"growth": list(self.growth)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AGIFormerConfig":
        """The inverse of `to_dict`; an unknown field is an error that names it."""
        # Checkpoints of before there were text heads say that they have none of the heads that these have replaced.
        values = {name: value for name, value in values.items() if (name, value) != ("recall_short_heads", 0)}
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config field {unknown[0]!r}: accepted are {', '.join(sorted(known))}")
        return cls(**values)


_SWITCH = {"true": True, "false": False}
_INTEGER_RANGES = (
    ("d_model", 8, 16384),
    ("n_layers", 1, 256),
    ("n_heads", 1, 256),
    ("patch_size", 1, 64),
    ("patch_overlap", 0, 64),
    ("byte_dim", 4, 8192),
    ("window", 1, 65536),
    ("petals", 1, 4096),
    ("ffn_dim", 1, 131072),
    ("thinking_steps", 0, 64),
    ("thinking_skip", 0, 64),
    ("reasoning_dim", 1, 131072),
    ("head_dim", 8, 16384),
    ("recall_heads", 0, 256),
    ("recall_text_heads", 0, 256),
    ("recall_dim", 1, 1024),
    ("recall_key_dim", 1, 1024),
    ("recall_span", 1, 64),
)
_FLOAT_RANGES = (("rope_base", 1.0, 1e12), ("plasticity", 0.0, 1.0))

PRESETS = {
    # Trains on a laptop's CPU in minutes.
    "nano": AGIFormerConfig(
        d_model=128, n_layers=3, n_heads=4, byte_dim=64, window=64, ffn_dim=512, reasoning_dim=512, head_dim=128
    ),
    "small": AGIFormerConfig(),
    "base": AGIFormerConfig(
        d_model=768, n_layers=9, n_heads=12, byte_dim=256, ffn_dim=3072, reasoning_dim=3072, head_dim=768
    ),
    "large": AGIFormerConfig(
        d_model=1280, n_layers=12, n_heads=20, byte_dim=256, ffn_dim=5120, reasoning_dim=5120, head_dim=1024
    ),
}
