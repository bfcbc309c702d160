"""The Hebbian fast-weight operator: one signature, several implementations.

`hebbian` is the only public name. `recurrent.py` reads like the formula and is what every other
implementation is tested against; `chunked.py` is the fast one in plain PyTorch, for any device.
"""

from model.kernels.hebbian import EPSILON, IMPLEMENTATIONS, hebbian

__all__ = ["EPSILON", "IMPLEMENTATIONS", "hebbian"]
