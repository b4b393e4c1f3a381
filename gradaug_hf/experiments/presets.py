"""Settings that go together, by name: exact to the paper, fast, or light."""

from typing import Any

import torch

from gradaug_hf.utils.compat import cpu_capabilities

WIDTH_DIVISOR = 8
WIDTH_LEVELS = 5
# What each preset sets on any device; "exact" is the paper's arithmetic, also without the settings of the device.
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "fast": {},
    "light": {"subnet_mode": "depth", "subnet_images": 0.25},
}


def preset_settings(preset: str, use_cpu: bool = False) -> dict[str, Any]:
    """Return the settings of a preset, by name of the field of GradAugConfig.

    Args:
        preset: "exact" is the paper's arithmetic: it sets nothing. "fast" uses channels-last memory, bfloat16 where
            the device computes in it, channel counts that are multiples of 8, and five widths, whose kernels are
            prepared once. "light" does so too, and its sub-networks leave out residual blocks instead of channels,
            each on a quarter of the batch of its own, for about 1.5 times the arithmetic of plain training; the
            model needs residual blocks.
        use_cpu: whether to train on the CPU where there is an accelerator too.

    Raises:
        ValueError: there is no such preset.

    Examples:
        >>> args = GradAugConfig("out", **preset_settings("fast"), resolutions=[224, 192, 160, 128])
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; it must be one of {', '.join(map(repr, PRESETS))}")
    if preset == "exact":
        return {}
    use_cpu = use_cpu or not torch.accelerator.is_available()
    settings = {"channels_last": True, "width_divisor": WIDTH_DIVISOR, "width_levels": WIDTH_LEVELS}
    settings |= PRESETS[preset]
    if computes_bfloat16(use_cpu):
        # The Trainer takes bf16 on a CPU only where it is told that it is one.
        settings |= {"bf16": True, "use_cpu": True} if use_cpu else {"bf16": True}
    return settings


def computes_bfloat16(use_cpu: bool) -> bool:
    """Return whether CPU or accelerator compute bfloat16, rather than converting it to float32 and back."""
    if use_cpu:
        capabilities = cpu_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
