"""What cost models know of the GPUs that targets are meant for. Published numbers; where none is, an A100's, and a comment says so."""

from __future__ import annotations

from dataclasses import dataclass

from qcompiler.base.targets import Target

A100_L2 = 5120 / 108
"""Bytes a cycle and multiprocessor: the card's level 2 cache delivers 5120 a cycle (NVIDIA's A100 whitepaper, "A100 L2 Cache")."""


@dataclass(frozen=True)
class Card:
    """processors: multiprocessors of the card; memory: bytes a cycle from its memory. Of each multiprocessor: resident threads, bytes of shared memory, bytes a
    cycle from the level 2 cache, and int8 multiply-accumulates a cycle by `mma.sync` (`products`) and by `wgmma` (`group_products`, 0: it has none)."""

    processors: int
    memory: float
    threads: int
    shared: int
    level2: float = A100_L2
    products: int = 1024
    group_products: int = 0


# Threads and shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (Hopper: 228 KB, also its tuning guide). Products:
# dense int8 TOPS of the data sheet / 2 / multiprocessors / boost clock, which are powers of two. Memory: GB/s of the data sheet / GHz of the boost clock.
CARDS = {
    "sm_75": Card(40, 320 / 1.59, 1024, 64 << 10),  # T4: 40 (Turing whitepaper, appendix A); level 2: not published
    "sm_80": Card(108, 1555 / 1.41, 2048, 164 << 10, products=2048),  # A100 40 GB: 624 TOPS at 1.41 GHz (whitepaper)
    "sm_86": Card(84, 696 / 1.74, 1536, 100 << 10),  # A40: 84 (data sheet: 10752 cores), 299.3 TOPS at 1.74 GHz; level 2: not published
    # Jetson AGX Orin 64 GB: 2048 cores, 85 dense TOPS at 1.3 GHz (technical brief); level 2: not published
    "sm_87": Card(16, 204.8 / 1.3, 1536, 164 << 10, products=2048),
    "sm_89": Card(128, 1008 / 2.52, 1536, 100 << 10),  # RTX 4090: 128, 660.6 TOPS at 2.52 GHz (Ada whitepaper); level 2: not published
    # H100 SXM and H200: 132, 1979 dense TOPS at 1.83 GHz (H100 whitepaper; the H200's data sheet has the same; memory is the H100's, the H200's has 4.8 TB/s).
    # Level 2: not published, taken to be the card's 5120 bytes a cycle of an A100. What mma.sync reaches is not published: half of wgmma, an A100's.
    "sm_90": Card(132, 3350 / 1.83, 2048, 228 << 10, level2=5120 / 132, products=2048),
    "sm_90a": Card(132, 3350 / 1.83, 2048, 228 << 10, level2=5120 / 132, products=2048, group_products=4096),
    # B200: 148; what mma.sync, which is not its way, reaches is not published: an A100's; nor is the clock, by which 8 TB/s are divided: an H100's
    "sm_100": Card(148, 8000 / 1.83, 2048, 228 << 10, products=2048),
    "sm_120": Card(170, 1792 / 2.41, 1536, 100 << 10),  # RTX 5090: 170, 838 dense TOPS at 2.41 GHz (RTX Blackwell whitepaper); level 2: not published
}


def card_of(target: Target | str) -> Card:
    """Of a target or an architecture ("sm_80"); an A100 where it is unknown."""
    return CARDS.get(target if isinstance(target, str) else str(target.tvm["arch"]), CARDS["sm_80"])
