"""What a vector ISA must offer to the convolution template, and the few words that kernels are written in.

A dot step works on `lanes` output channels at once. The activation operand is `group` adjacent input channels, broadcast; the weight
operand holds the same `group` channels of each of the `lanes` output channels:

    acc[lane] += sum(x[k] * w[lane][k] for k in range(group))

An ISA may serve several dot steps with one load of activations (`span`: ARM multiplies by an element of a vector), and several output pixels
with one instruction (`pixels`: ARM's matrix instruction mixes two pixels in an accumulator, so those are tied and untied around the reduction).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T


def load(buffer: Any, index: Any, lanes: int) -> Any:
    """`lanes` adjacent elements of a flat buffer; any alignment."""
    return buffer[T.ramp(index, 1, lanes)] if lanes > 1 else buffer[index]


def save(buffer: Any, index: Any, value: Any, lanes: int) -> None:
    """Store `lanes` adjacent elements to a flat buffer; any alignment."""
    T.buffer_store(buffer, value, [T.ramp(index, 1, lanes) if lanes > 1 else index])


def shuffle(vectors: Sequence[Any], indices: Sequence[int]) -> Any:
    """The elements `indices` of the concatenated `vectors` (a constant permutation; LLVM finds the instruction)."""
    return tirx.Shuffle(list(vectors), [tirx.const(int(i), "int32") for i in indices])


def call(dtype: str, name: str, *args: Any) -> Any:
    """An LLVM intrinsic without side effects."""
    return T.call_llvm_pure_intrin(dtype, name, *args)


def scalar(value: Any, dtype: str, lanes: int) -> Any:
    """A constant in every lane."""
    return T.broadcast(tirx.const(value, dtype), lanes)


class Cycles(float):
    """Cycles of a core, and where the number is from (`source`: measured on what, or guessed from what). They steer heuristics, never results.
    Arithmetic gives plain numbers."""

    source: str

    def __new__(cls, number: float, source: str) -> Cycles:
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{number} cycles ({source}): expected a positive number")
        made = super().__new__(cls, number)
        made.source = source
        return made

    def __getnewargs__(self) -> tuple[float, str]:  # type: ignore[override]
        return float(self), self.source

    def times(self, factor: float) -> Cycles:
        return Cycles(factor * self, f"{self.source}, times {factor}")


def measured(core: str) -> Callable[[float], Cycles]:
    """Makes numbers that were measured on `core`."""
    return lambda number: Cycles(number, f"measured on {core}")


def guessed(basis: str) -> Callable[[float], Cycles]:
    """Makes numbers that were not measured, but concluded from `basis`."""
    return lambda number: Cycles(number, f"guessed from {basis}")


def demand(name: str, facts: dict[str, bool]) -> None:
    """Raises ValueError with the first of `facts` (sentences) that does not hold of the ISA `name`."""
    for fact, holds in facts.items():
        if not holds:
            raise ValueError(f"ISA '{name}' contradicts itself; what has to hold: {fact}")


@dataclass(frozen=True, kw_only=True)
class Isa(ABC):
    """One way to compute dot steps. Raises ValueError for facts that contradict each other.

    name               the kernel row of targets.yaml
    lanes              32-bit elements of a vector
    registers          vector registers of the architecture
    group              adjacent input channels of a dot step
    scratch_registers  vector registers that a tile needs besides the accumulators and one weight operand per block
    dot_cost           cycles per accumulator and step
    broadcast_cost     cycles per activation operand and step
    weight_cost        cycles per weight operand and step
    epilogue_cost      cycles per accumulator
    latency            cycles from one dot of an accumulator to the next
    sharing            pixels that may share a vector which the channels of one leave so empty
    """

    name: str
    lanes: int
    registers: int
    group: int
    scratch_registers: int
    dot_cost: Cycles
    broadcast_cost: Cycles
    weight_cost: Cycles
    epilogue_cost: Cycles
    latency: Cycles
    sharing: int = 1

    def __post_init__(self) -> None:
        costs = (self.dot_cost, self.broadcast_cost, self.weight_cost, self.epilogue_cost, self.latency)
        demand(
            self.name,
            {
                "vectors are whole parts of 128 bits": self.lanes >= 4 and self.lanes % 4 == 0,
                "groups are positive powers of two": self.group > 0 and self.group & (self.group - 1) == 0,
                "a float step takes one channel": not self.is_float or self.group == 1,
                "scratch leaves registers for a tile": 0 < self.scratch_registers < self.registers - 1,
                "every cost is measured or guessed": all(isinstance(cost, Cycles) for cost in costs),
            },
        )

    @property
    @abstractmethod
    def is_float(self) -> bool:
        """Whether it computes in float32, else in int8."""

    @property
    def forms(self) -> tuple[Isa, ...]:
        """Forms of the dot step, cheapest first, same in lanes, group and bytes of weights. Each computes the weights exactly that it `takes`;
        this one, which takes any, comes last."""
        return (self,)

    @property
    def unrolled(self) -> int:
        """The most dot steps that the heuristic unrolls."""
        return 4

    @property
    def span(self) -> int:
        """Dot steps that one load of activations serves: a power of two."""
        return 1

    @property
    def pixels(self) -> int:
        """Output pixels whose accumulators are computed together."""
        return 1

    @property
    def storage_offset(self) -> int:
        """What storage adds to a canonical int8 value."""
        return 128 if self.input_dtype == "uint8" else 0

    @property
    def accumulator(self) -> str:
        return "float32" if self.is_float else "int32"

    @property
    def weight_dtype(self) -> str:
        return "float32" if self.is_float else "int8"

    @property
    def bytes(self) -> int:
        """Of a vector."""
        return 4 * self.lanes

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights per block and dot step."""
        return self.lanes * (4 if self.is_float else self.group)

    def step_cycles(self, pixels: int, blocks: float, streamed: bool) -> float:
        """Estimated cycles of one dot step of a tile of so many vectors per pixel; `streamed`: its weights come from the level 2 cache, at 24 bytes a cycle."""
        dots, operands = pixels * blocks * self.dot_cost, pixels * self.broadcast_cost + blocks * self.weight_cost
        stream = blocks * self.weight_bytes / 24 if streamed else 0.0
        return max(dots, operands, stream, self.latency)

    def fits(self, pixels: int, blocks: int) -> bool:
        """Whether a tile's accumulators and operands fit the registers."""
        return pixels * blocks + blocks + self.scratch_registers <= self.registers

    def refuse(self, pixels: int, inputs: int, weight: np.ndarray) -> str | None:
        """Why an operator with so many output pixels (of an image) and input channels (of a group) can't be computed this way, or None."""
        return None

    def takes(self, groups: np.ndarray) -> np.ndarray:
        """Which dot steps over [..., lanes, group] weights this form computes exactly, whatever the activations: bool [...]."""
        return np.ones(groups.shape[:-2], bool)

    def missing(self, groups: np.ndarray) -> np.ndarray:
        """What `dot` leaves out of the sum over [..., lanes, group] weights, whatever the activations: int64 [..., lanes]."""
        return np.zeros(groups.shape[:-1], np.int64)

    def packed_dwords(self, blocks: int) -> list[int]:
        """The permutation of dwords that makes the pixels of a packed vector contiguous: result[i] = packed[order[i]].

        `pack` works within 128-bit parts: dword 4 * part + slot holds lanes 4 * part .. 4 * part + 3 of that slot. Slots are (pixel, block)
        with `blocks` blocks per pixel. Four blocks of one pixel need no permutation, because the weights are packed in `channel_order`.
        """
        parts = range(self.lanes // 4)
        return [4 * part + pixel * blocks + block for pixel in range(4 // blocks) for part in parts for block in range(blocks)]

    def channel_order(self, blocks: int) -> np.ndarray:
        """Which channel of a run of `blocks * lanes` each (block, lane) computes, so that `pack` yields them in order."""
        part, i = np.divmod(np.arange(self.lanes), 4)
        return np.concatenate([part * 4 * blocks + 4 * block + i for block in range(blocks)])

    @property
    @abstractmethod
    def input_dtype(self) -> str:
        """Storage type of activations."""

    @abstractmethod
    def pack_weights(self, groups: np.ndarray) -> np.ndarray:
        """[..., lanes, group] weights in the order the weight operands are read, [..., lanes * group]."""

    @abstractmethod
    def weights(self, buffer: Any, index: Any) -> list[Any]:
        """The operands that `dot` wants for one block of lanes: `lanes * group` elements at `index`."""

    @abstractmethod
    def activation(self, buffer: Any, index: Any, valid: int) -> list[Any]:
        """`group` channels at `index` in every lane; only the first `valid` of them are read, the others are 0."""

    def activations(self, buffer: Any, places: Sequence[Any], valid: int, steps: int) -> list[Any]:
        """For each of `steps` <= `span` adjacent dot steps, the operand of the `pixels` pixels at `places`; `valid` < `group`: of a lone step."""
        assert steps == len(places) == 1
        return [self.activation(buffer, places[0], valid)]

    @abstractmethod
    def dot(self, acc: Any, x: list[Any], w: list[Any]) -> Any:
        """acc + x . w - what is `missing`, per lane; exact for integers."""

    def join(self, activations: Sequence[list[Any]]) -> list[Any]:
        """The operand that holds up to `sharing` of these, each in an equal part of the lanes."""
        raise NotImplementedError

    def tie(self, bias: Any) -> list[Any]:
        """The first values of the accumulators of `pixels` pixels and one block."""
        return [bias] * self.pixels

    def dots(self, accs: Sequence[Any], x: Any, w: list[Any]) -> list[Any]:
        """`dot` for the accumulators of `pixels` pixels and one block."""
        return [self.dot(accs[0], x, w)]

    def untie(self, accs: Sequence[Any]) -> list[Any]:
        """The sums of each of the `pixels` pixels."""
        return list(accs)

    @abstractmethod
    def to_int(self, value: Any) -> Any:
        """float32 lanes to int32, ties to even; what lies above the range may become INT32_MIN."""

    @abstractmethod
    def pack(self, slots: Sequence[Any], offset: Any, signed: bool) -> Any:
        """Four vectors of int32, plus `offset` (int16 lanes; None: 0), saturated to 8 bits: one vector of bytes, ordered as `packed_dwords` says."""

    @abstractmethod
    def unpack(self, packed: Any, slot: int) -> Any:
        """int32 lanes of one slot of a packed vector of `input_dtype`."""
