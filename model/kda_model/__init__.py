"""Kimi Linear: layers of Kimi Delta Attention and of latent attention, mixture of experts, in PyTorch.

Reading order: ``config``, ``kda_layer``, ``latent_attention``, ``experts``, ``model``; then ``cache`` and ``generate`` for inference,
``checkpoint`` for weights, ``training`` for the rest. ``operators`` is where the recurrence itself comes from.
"""

from kda_model.cache import Cache
from kda_model.config import KimiLinearConfig
from kda_model.model import KimiLinear, initialise
from kda_model.operators import Operator, find_operator
from kda_model.packing import Packing, pack
from kda_model.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "Cache",
    "KimiLinear",
    "KimiLinearConfig",
    "Operator",
    "Packing",
    "find_operator",
    "initialise",
    "pack",
    "preset",
]
