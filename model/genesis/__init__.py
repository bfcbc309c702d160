"""GENESIS (seed 000): replay, amplifier, persistence, learning curve and gate, one mechanism a file, on any module.

Code written for the seed's `genesis_module` needs to change its import alone.
"""

from model.genesis.ethical_gate import EthicalGate
from model.genesis.plugin import GenesisPlugin, IntegratedLearningModule, attach_genesis_plugin
from model.genesis.replay import SelfReplayBuffer

__all__ = [
    "EthicalGate",
    "GenesisPlugin",
    "IntegratedLearningModule",
    "SelfReplayBuffer",
    "attach_genesis_plugin",
]
