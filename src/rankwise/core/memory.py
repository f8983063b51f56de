"""How much memory the process has needed so far."""

import sys

import torch


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Return the largest memory the process has held.

    Args:
        device: on a CUDA device, what PyTorch allocated there; else the resident memory of the process.
            Both are since the start, or since the last reset of CUDA's figure.

    >>> peak_memory_bytes() > 0
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil  # accelerate brings it

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes, but bytes on macOS
