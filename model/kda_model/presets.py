"""Configurations by name: the released model, a ladder of five sizes as in the report's scaling study, and tiny ones.

The ladder follows the report in its rule (as many heads as layers, 8 of 64 experts, head width 128) and in the number of
activated parameters, without the input embedding, that names each step. Its widths are not the report's, whose table was not at
hand: they were chosen here to meet that number, and a test counts them.
"""

from __future__ import annotations

from kda_reference.errors import DomainError

from kda_model.config import KimiLinearConfig

_TINY = KimiLinearConfig(
    vocab_size=64, hidden_size=32, num_layers=4, num_heads=2, latent_rank=12, key_width=8, shared_key_width=4, value_width=8,
    kda_num_heads=2, kda_head_width=8, intermediate_size=48, num_experts=8, num_chosen_experts=2, expert_width=16,
    max_length=4096, bos_id=0, eos_id=1, pad_id=2,
)  # fmt: skip


def _ladder(steps: int, hidden: int, expert_width: int) -> KimiLinearConfig:
    """Return a step of the ladder: heads and layers in step, 8 of 64 experts."""
    return KimiLinearConfig(
        hidden_size=hidden, num_layers=steps, num_heads=steps, kda_num_heads=steps, num_experts=64,
        intermediate_size=4 * hidden, expert_width=expert_width,
    )  # fmt: skip


PRESETS: dict[str, KimiLinearConfig] = {
    "48b-a3b": KimiLinearConfig(),
    "653m": _ladder(16, 1216, 544),
    "878m": _ladder(18, 1376, 624),
    "1.1b": _ladder(20, 1536, 640),
    "1.4b": _ladder(22, 1632, 752),
    "1.7b": _ladder(24, 1776, 768),
    "tiny": _TINY,
    "tiny-dense": _TINY.replace(num_dense_layers=4),
    "tiny-grouped-values": _TINY.replace(kda_num_value_heads=4),
    # Two KDA layers of two heads of width 128, as in the report's synthetic tasks.
    "synthetic": KimiLinearConfig(
        vocab_size=64,
        hidden_size=256,
        num_layers=2,
        num_heads=2,
        kda_num_heads=2,
        intermediate_size=512,
        num_dense_layers=2,
        layer_types=("kda", "kda"),
        max_length=4096,
        bos_id=None,
        eos_id=None,
        pad_id=None,
    ),
}


def preset(name: str) -> KimiLinearConfig:
    """Return a configuration by name.

    Raises
    ------
    DomainError
        If there is none of that name; lists those there are.
    """
    if name not in PRESETS:
        message = f"preset must be one of {', '.join(PRESETS)}, got {name!r}; or read a config.json"
        raise DomainError(message)
    return PRESETS[name]
