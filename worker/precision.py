"""Which number type an image encoder runs in. Everything after the encoder runs in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

#: `auto`: 16 bits where the device multiplies these natively, for encoders that are known to bear it; else float32.
PRECISIONS = ("auto", "float32")
#: What a processor is called to have where it multiplies bfloat16 natively; others emulate it, which is slow.
CPU_CAPABILITIES = ("avx512_bf16", "amx_bf16")


def encoder_precision(precision: str, device: torch.device, *, bears_half: bool) -> torch.dtype | None:
    """The 16-bit type for an encoder on `device`, or None for float32. `bears_half`: whether its masks are as good so.
    Raises ValueError for an unknown name."""
    if precision not in PRECISIONS:
        raise ValueError(f"There is no precision called {precision!r}. Choose one of: {', '.join(PRECISIONS)}.")
    if precision == "float32" or not bears_half:
        return None
    return half_precision(device)


def half_precision(device: torch.device) -> torch.dtype | None:
    """The 16-bit floating-point type that the device multiplies natively, or None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return torch.bfloat16 if any(found.get(name) for name in CPU_CAPABILITIES) else None
    return None


def running_in(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Run products in `dtype` inside the block, sums and norms in float32; None: everything in float32."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
