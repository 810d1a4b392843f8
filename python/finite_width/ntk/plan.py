"""Chooses, per parameter and from shapes alone, how its part of the kernel is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .capture import Use
from .contract import Target
from .layout import Layout
from .probing import Seen

# Rows of one block: a power of two such that what a block's sweep touches stays near this many bytes. It depends on
# shapes alone, so that the result has the same bits for any memory budget.
BLOCK_BYTES = 64 << 20
BLOCK_ROWS = 2048
# Fewer rows than these are bound by calls: they may touch more (a ResNet of width 16: 2 rows 1.00 s, 8 rows 0.64 s; the
# tutorial's CNN, 64 x 64 rows: 8 rows 190 ms, 16 rows 180 ms). Where both batches together have no more than
# ONE_SWEEP_ROWS, one sweep serves them (20 + 5 rows: 26 ms instead of 30).
# Without convolutions a sweep does less for each call (two Transformer layers of width 64, or 784 outputs of an MLP).
FEW_ROWS = 16
ONE_SWEEP_ROWS = 32
FEW_ROWS_WITHOUT_CONVOLUTIONS = 32
FEW_ROWS_BYTES = 256 << 20
# On a GPU a pair of blocks must fill every multiprocessor with squares of 128 rows: 4096 rows make 1024 squares. A
# sweep of fewer rows is bound by its launches, so it may touch an eighth of the GPU's memory.
GPU_BLOCK_ROWS = 4096
GPU_BLOCK_PART = 8
# One tile of a convolution's Jacobian, over TILE_ROWS rows of a block; on a GPU over all of them, this part of what a
# sweep may touch: each tile is a handful of launches, and its rows should fill squares of 128.
TILE_BYTES = 16 << 20
TILE_ROWS = 16
GPU_TILE_PART = 16
METHODS = ("auto", "structured", "jacobian", "products")

Role = tuple[int, str]  # (index of the use, "weight" or "bias")


@dataclass
class Entry:
    """How the parameters `names` are computed together."""

    method: str  # "gram", "last", "ghost", "gradients", "tiles", "tokens", "made", "vmap", "loop"
    names: tuple[str, ...]
    roles: list[Role]
    bias: float = 0.0  # 1 where a bias is fused into "gram", "last", "ghost" or a convolution's "gradients"
    flops: float = 0.0
    row_bytes: int = 0  # what the factor keeps per row
    cuts: list[int] = field(default_factory=list)  # of "tiles": the weight's rows [cuts[i], cuts[i + 1])
    tile_bytes: int = 0  # of "tiles": one tile's Jacobian, per row of the batch


@dataclass
class MadeValue:
    """What a plan knows of a value made from parameters (made.py)."""

    names: tuple[str, ...]  # of the parameters
    size: int
    batched: bool  # its cotangents are pulled back in one sweep, or one by one


@dataclass
class Plan:
    """The entries, and what every block must repeat for them to hold."""

    outputs: int
    entries: list[Entry]
    signatures: list[tuple]
    layouts: list[Layout | None]
    row_shapes: list[tuple[int, ...] | None]  # of one row's part of each use that has a layout
    made: list[MadeValue]
    unrecognised: set[str]  # parameters that the graph reaches
    block: int  # rows of a block
    batched_backward: bool  # one sweep for all outputs, or one for each
    last: int | None  # the use whose output is the model's
    sweep_bytes: int  # working memory of one block's forward and backward, per row
    copies_inputs: bool  # the model writes its input in place
    sure: list[bool]  # whether a use's rows lie by its layout in any block; else each block must show it
    apart: bool  # by a forward's calls rows do not mix; each block's must be such, too
    probe: Seen | None = None  # what the first rows of the first batch gave, for comparison

    @property
    def generic(self) -> list[str]:
        """The parameters whose Jacobian is computed by autograd."""
        return [name for entry in self.entries if entry.method in ("vmap", "loop") for name in entry.names]

    @property
    def row_bytes(self) -> int:
        """What a block keeps per row."""
        return sum(entry.row_bytes for entry in self.entries)

    @property
    def needed(self) -> list[int]:
        """The uses whose cotangents the entries ask for."""
        wanted = {use for entry in self.entries if entry.method != "last" for use, _ in entry.roles}
        return sorted(wanted)


def positions(use: Use, rows: int) -> int:
    """T of a dense use or an embedding: how often each row passes through it."""
    return math.prod(use.shape[:-1]) // rows


def row_axes(use: Use) -> list[int]:
    """The axes of the output that may hold the rows."""
    axes = len(use.shape)
    if use.kind in ("dense", "embedding"):
        return list(range(axes - 1))
    if use.kind == "scale":
        begin, end = use.options["axes"]
        return [axis for axis in range(axes) if not begin <= axis < end]
    return [0]


def roles_of(uses: Sequence[Use], names: Sequence[str]) -> dict[str, list[Role]]:
    """The uses of parameters and made values."""
    roles: dict[str, list[Role]] = {name: [] for name in names}
    for index, use in enumerate(uses):
        if use.weight:
            roles[use.weight].append((index, "weight"))
        if use.bias:
            roles[use.bias].append((index, "bias"))
    return roles


@dataclass
class Sizes:
    """What the cost model knows: numbers of rows, outputs, and which products are wanted."""

    rows: int
    columns: int
    outputs: int
    compute: str
    itemsize: int
    symmetric: bool

    @property
    def pairs(self) -> float:
        return self.rows * (self.rows + 1) / 2 if self.symmetric else self.rows * self.columns

    @property
    def products(self) -> int:
        """Inner products of cotangents per pair of rows."""
        return self.outputs**2 if self.compute == "full" else self.outputs

    @property
    def sides(self) -> int:
        return self.rows if self.symmetric else self.rows + self.columns


class Planner:
    """Turns the recorded uses into entries."""

    def __init__(self, target: Target, uses: list[Use], rows: int, sizes: Sizes, fuse: bool) -> None:
        self.target, self.uses, self.rows, self.sizes = target, uses, rows, sizes
        self.fuse = fuse  # a bias with its weight, in one entry
        self.tile_row_bytes = TILE_BYTES // TILE_ROWS
        if target.device.type == "cuda":
            touched = sweep_bytes(uses, sizes.outputs, rows, sizes.itemsize)
            swept = min(block_rows(touched, uses, target.device, sizes.sides), max(sizes.rows, sizes.columns))
            self.tile_row_bytes = block_limits(target.device)[1] // GPU_TILE_PART // swept

    def entries(self, roles: dict[str, list[Role]], last: int | None) -> list[Entry]:
        found: list[Entry] = []
        fused: set[str] = set()
        for name, own in roles.items():
            if not own or name in fused:
                continue
            entry = self._entry(name, own, last)
            partner = self._partner(entry, own, roles) if self.fuse else None
            if partner:
                fused.add(partner)
                entry.names, entry.bias = (*entry.names, partner), 1.0
                if entry.method == "gradients":
                    both = self._gradients(partner, roles[partner])
                    entry.flops, entry.row_bytes = entry.flops + both.flops, entry.row_bytes + both.row_bytes
                found = [other for other in found if partner not in other.names]
            found.append(entry)
        return found

    def made_entries(self, roles: dict[str, list[Role]], made: Sequence[MadeValue]) -> list[Entry]:
        """Of parameters from which values are made: all their roles, and those of the values."""
        found, sizes = [], self.sizes
        for name, own in roles.items():
            size = self.target.parameters[name].numel()
            flops = 2 * sizes.pairs * sizes.products * size
            flops += 2 * sizes.sides * sizes.outputs * sum(value.size for value in made if name in value.names)
            found.append(Entry("made", (name,), own, 0.0, flops, sizes.outputs * size * sizes.itemsize))
        return found

    def _partner(self, entry: Entry, own: list[Role], roles: dict[str, list[Role]]) -> str | None:
        """The bias that has exactly the uses of this weight."""
        if entry.method not in ("gram", "last", "ghost", "gradients"):
            return None
        kinds = {(self.uses[index].kind, role) for index, role in own}
        if entry.method == "gradients" and kinds not in ({("conv", "weight")}, {("scale", "weight")}):
            return None
        bias = self.uses[own[0][0]].bias
        same = bias is not None and roles.get(bias) == [(index, "bias") for index, _ in own]
        return bias if same else None

    def _entry(self, name: str, own: list[Role], last: int | None) -> Entry:
        kinds = {(self.uses[index].kind, role) for index, role in own}
        if kinds == {("dense", "weight")} and len({self.uses[index].options["flipped"] for index, _ in own}) == 1:
            return self._dense(name, own, last)
        if kinds == {("embedding", "weight")}:
            return self._tokens(name, own)
        if kinds <= {("conv", "weight"), ("conv_transpose", "weight")}:
            return self._conv(name, own)
        return self._gradients(name, own)

    def _positions(self, own: list[Role]) -> int:
        return sum(positions(self.uses[index], self.rows) for index, _ in own)

    def _held(self, own: list[Role]) -> int:
        """Values per row of the uses' inputs and the cotangents of all outputs."""
        uses = [self.uses[index] for index, _ in own]
        return sum(use.input.numel() + self.sizes.outputs * math.prod(use.shape) for use in uses) // self.rows

    def _dense(self, name: str, own: list[Role], last: int | None) -> Entry:
        sizes, first = self.sizes, self.uses[own[0][0]]
        inputs, channels, times = first.input.shape[-1], first.shape[-1], self._positions(own)
        if times == 1 and own[0][0] == last:
            flops = 2 * sizes.pairs * inputs
            return Entry("last", (name,), own, 0.0, flops, inputs * sizes.itemsize)
        held = self._held(own)
        if times == 1:
            flops = 2 * sizes.pairs * (inputs + sizes.products * channels)
            return Entry("gram", (name,), own, 0.0, flops, held * sizes.itemsize)
        ghost = 2 * sizes.pairs * times**2 * (inputs + sizes.products * (channels + 1))
        gradients = self._gradients(name, own)
        if ghost < gradients.flops:
            return Entry("ghost", (name,), own, 0.0, ghost, held * sizes.itemsize)
        return self._in_tiles(gradients, channels, 1)

    def _tokens(self, name: str, own: list[Role]) -> Entry:
        sizes, times = self.sizes, self._positions(own)
        width = self.uses[own[0][0]].shape[-1]
        flops = 2 * sizes.pairs * times**2 * sizes.products * width
        gradients = self._gradients(name, own)
        if gradients.flops < flops:  # a small table, and long rows
            return gradients
        return Entry("tokens", (name,), own, 0.0, flops, times * sizes.outputs * width * sizes.itemsize)

    def _conv(self, name: str, own: list[Role]) -> Entry:
        filters = self.target.parameters[name].shape[0]
        groups = math.lcm(*(self.uses[index].options["geometry"][-1] for index, _ in own))
        return self._in_tiles(self._gradients(name, own), filters, filters // groups if groups > 1 else 1)

    def _in_tiles(self, entry: Entry, rows: int, unit: int) -> Entry:
        """The entry of a weight's gradients in tiles over its rows, whole units of them, where that holds less."""
        sizes, size = self.sizes, self.target.parameters[entry.names[0]].numel()
        held = self._held(entry.roles)
        if sizes.outputs * size <= held:
            return entry  # the gradients are smaller than what they are made from: keep them instead
        each = size // rows
        width = max(1, self.tile_row_bytes // (sizes.itemsize * sizes.outputs * each))
        step = max(unit, width // unit * unit)
        entry.method, entry.row_bytes = "tiles", held * sizes.itemsize
        entry.cuts = [*range(0, rows, step), rows]
        entry.tile_bytes = sizes.itemsize * sizes.outputs * min(step, rows) * each
        return entry

    def _gradients(self, name: str, own: list[Role]) -> Entry:
        sizes, size = self.sizes, self.target.parameters[name].numel()
        flops = 2 * sizes.pairs * sizes.products * size
        for index, role in own:
            use = self.uses[index]
            spots = math.prod(use.shape) // self.rows
            if role == "weight" and use.kind == "dense":
                flops += 2 * sizes.sides * sizes.outputs * spots * use.input.shape[-1]
            elif role == "weight" and use.kind == "conv":
                flops += 2 * sizes.sides * sizes.outputs * spots * (size // use.shape[1])
            elif role == "weight" and use.kind == "conv_transpose":
                inputs = use.input.numel() // self.rows
                flops += 2 * sizes.sides * sizes.outputs * inputs * (size // use.input.shape[1])
            else:
                flops += 2 * sizes.sides * sizes.outputs * spots
        return Entry("gradients", (name,), own, 0.0, flops, sizes.outputs * size * sizes.itemsize)


def block_limits(device: torch.device) -> tuple[int, int]:
    """The most rows of a block on the device, and the bytes that a sweep over one should touch."""
    if device.type == "cuda":
        return GPU_BLOCK_ROWS, torch.cuda.get_device_properties(device).total_memory // GPU_BLOCK_PART
    return BLOCK_ROWS, BLOCK_BYTES


def block_rows(row_bytes: int, uses: Sequence[Use], device: torch.device, sides: int) -> int:
    """Rows of a block: a power of two. `sides`: the rows of both batches."""
    rows, size = block_limits(device)
    most = max(1, min(rows, size // max(1, row_bytes)))
    if device.type == "cpu":
        without_convolutions = bool(uses) and not any(use.kind in ("conv", "conv_transpose") for use in uses)
        few = FEW_ROWS_WITHOUT_CONVOLUTIONS if without_convolutions else FEW_ROWS
        most = max(most, min(rows, few, FEW_ROWS_BYTES // max(1, row_bytes)))
        if most < sides <= min(rows, ONE_SWEEP_ROWS) and sides * row_bytes <= FEW_ROWS_BYTES:
            most = 1 << (sides - 1).bit_length()
    return 1 << (most.bit_length() - 1)


def sweep_bytes(uses: Sequence[Use], outputs: int, rows: int, itemsize: int) -> int:
    """Bytes per row that one block's forward and batched backward touch at once, as far as the uses tell."""
    total = 0
    for use in uses:
        if any(use.input.stride()):  # else one value stands for an input that is not kept
            total += use.input.numel() * use.input.element_size() // rows
        # The output and its activation; the cotangents of the layer and, for a moment, of the activation before it.
        total += (2 + 2 * outputs) * (math.prod(use.shape) // rows) * itemsize
    return total
