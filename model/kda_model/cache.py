"""What a model remembers of its sequences, in one object: KDA states, convolution tails, paged latents.

A call of the model opens the cache for its new tokens, and everything counts only when the call is over: one that fails leaves the
sequences as they were. A KDA state cannot be run backwards, so a cache is trimmed to a mark that was set before.

    fork    another cache with some of the sequences, any number of times each; pages are shared until written to
    mark    remember where all sequences are now;  trim    return there
    save    one file;  load    the same cache bit for bit
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from kda_reference.errors import DomainError
from safetensors import safe_open
from safetensors.torch import save_file

from kda_model.kda_layer import KdaMemory
from kda_model.pages import LatentPages, LatentView

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from kda_model.config import KimiLinearConfig
    from kda_model.packing import Packing

PAGE_LEN = 64


@dataclass(frozen=True, eq=False)
class Mark:
    """Where the sequences of a cache were: their lengths, and copies of the KDA memories by layer."""

    lengths: tuple[int, ...]
    memories: dict[int, KdaMemory]


class Cache:
    """Memory of N sequences in every layer of one model.

    Parameters
    ----------
    config
        Of the model.
    num_sequences
        N.
    dtype
        Of tails and latents: the model's. States are float32, or float64 for a float64 model.
    device
        The model's.
    page_len
        Tokens of a page.
    pages
        A pool to share with another cache; ``None`` means an own one.

    Attributes
    ----------
    lengths
        Tokens of each sequence so far.
    memories
        Of the KDA layers, by layer; their tensors stay where they are.
    """

    def __init__(
        self,
        config: KimiLinearConfig,
        num_sequences: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        page_len: int = PAGE_LEN,
        pages: LatentPages | None = None,
    ) -> None:
        device = torch.device(device)
        self.config, self.dtype = config, dtype
        self.lengths = [0] * num_sequences
        self._full = [layer for layer, kind in enumerate(config.layers) if kind == "full"]
        width = config.latent_rank + config.shared_key_width
        self.pages = LatentPages(len(self._full), page_len, width, dtype, device) if pages is None else pages
        self.tables: list[list[int]] = [[] for _ in range(num_sequences)]
        weakref.finalize(self, _release, self.pages, self.tables).atexit = False
        self.device_lengths = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        self.table = torch.zeros(num_sequences, 0, dtype=torch.int64, device=device)
        self.memories = {
            layer: _empty_memory(config, num_sequences, dtype, device)
            for layer, kind in enumerate(config.layers)
            if kind == "kda"
        }
        self._marks: list[Mark] = []
        self._frame: tuple[list[int], Tensor, Tensor] | None = None

    @property
    def num_sequences(self) -> int:
        """Return N."""
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Return where everything is."""
        return self.device_lengths.device

    def reserve(self, num_tokens: int) -> None:
        """Give every sequence the pages for its next tokens."""
        self._extend([num_tokens] * self.num_sequences)

    def _extend(self, new: list[int]) -> None:
        changed = False
        for table, length, number in zip(self.tables, self.lengths, new, strict=True):
            changed |= self._make_room(table, length, length + number)
        if changed:
            self._copy_tables()

    def _make_room(self, table: list[int], length: int, total: int) -> bool:
        """Let a sequence own every page that its tokens from ``length`` to ``total`` touch."""
        if not self._full:
            return False
        page_len, before = self.pages.page_len, list(table)
        for index in range(length // page_len, len(table) if total > length else 0):
            table[index] = self.pages.owned(table[index])
        while len(table) * page_len < total:
            table.append(self.pages.new_page())
        return table != before

    def _copy_tables(self) -> None:
        widest = max(map(len, self.tables), default=0)
        rows = [table + [0] * (widest - len(table)) for table in self.tables]
        self.table = torch.tensor(rows, dtype=torch.int64, device=self.device).view(self.num_sequences, widest)

    def open(self, tokens: Tensor, packing: Packing | None) -> Tensor:
        """Prepare a call on new tokens ``[B, T]``, one row or, with a packing, one packed sequence for each of N.

        Returns
        -------
        Tensor
            The position of each new token in its sequence ``[B, T]``.

        Raises
        ------
        DomainError
            If the call has another number of sequences.
        """
        new = [tokens.shape[1]] * tokens.shape[0] if packing is None else list(packing.lengths)
        if len(new) != self.num_sequences:
            message = (
                f"tokens must belong to the cache's {self.num_sequences} sequences, got {len(new)}; fork the cache"
            )
            raise DomainError(message)
        self._extend(new)
        totals = [length + number for length, number in zip(self.lengths, new, strict=True)]
        if packing is None:
            sequence = torch.arange(tokens.shape[0], device=self.device)[:, None]
            positions = self.device_lengths[:, None] + torch.arange(tokens.shape[1], device=self.device)
            device_totals = self.device_lengths + tokens.shape[1]
        else:
            numbers = packing.cu_seqlens.diff()
            sequence = torch.arange(len(new), device=self.device).repeat_interleave(
                numbers, output_size=tokens.shape[1]
            )[None]
            positions = self.device_lengths[sequence] + packing.positions
            device_totals = self.device_lengths + numbers
        slots = positions
        if self._full:
            page_len = self.pages.page_len
            slots = self.table[sequence, positions // page_len] * page_len + positions % page_len
        self._frame = (totals, device_totals, slots.flatten())
        return positions

    def view(self, layer: int) -> LatentView:
        """Return one full-attention layer's latents in the open call."""
        assert self._frame is not None  # noqa: S101 - the model opens the cache first
        totals, device_totals, slots = self._frame
        return LatentView(self.pages, self._full.index(layer), self.tables, self.table, slots, totals, device_totals)

    @torch.no_grad()
    def close(self, memories: dict[int, KdaMemory]) -> None:
        """End the call: keep the new memories, and count its tokens. A CUDA graph records what happens on the device."""
        assert self._frame is not None  # noqa: S101 - as above
        for layer, memory in memories.items():
            for kept, found in zip(self.memories[layer], memory, strict=True):
                kept.copy_(found)
        totals, device_totals, _ = self._frame
        self.device_lengths.copy_(device_totals)
        self.lengths, self._frame = totals, None

    def count(self, number: int) -> None:
        """Count, on the host alone, tokens that a graph of a call has added on the device."""
        self.lengths = [length + number for length in self.lengths]

    def reset(self) -> None:
        """Forget everything, values included, so that nothing of one use reaches the next."""
        _release(self.pages, self.tables)
        self._marks.clear()
        for memory in self.memories.values():
            for tensor in memory:
                tensor.zero_()
        self._set_lengths((0,) * self.num_sequences)

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.device_lengths.copy_(torch.tensor(self.lengths, dtype=torch.int64))
        for table, length in zip(self.tables, self.lengths, strict=True):
            while len(table) > -(-length // self.pages.page_len):
                self.pages.release(table.pop())
        self._copy_tables()

    def fork(self, rows: Sequence[int] | None = None) -> Cache:
        """Return a cache of some sequences, each as often as it is named; ``None`` means all, once.

        Raises
        ------
        DomainError
            If a row is not one of this cache.
        """
        rows = range(self.num_sequences) if rows is None else rows
        for row in rows:
            if not 0 <= row < self.num_sequences:
                message = f"rows must lie in 0..{self.num_sequences - 1}, got {row}; name sequences of this cache"
                raise DomainError(message)
        made = Cache(self.config, len(rows), dtype=self.dtype, device=self.device, pages=self.pages)
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        for layer, memory in self.memories.items():
            for kept, found in zip(made.memories[layer], memory, strict=True):
                kept.copy_(found[index])
        for table, row in zip(made.tables, rows, strict=True):
            for page in self.tables[row]:
                self.pages.share(page)
                table.append(page)
        made._set_lengths([self.lengths[row] for row in rows])
        return made

    def mark(self) -> Mark:
        """Remember where all sequences are."""
        copies = {layer: KdaMemory(*(x.clone() for x in memory)) for layer, memory in self.memories.items()}
        self._marks.append(Mark(tuple(self.lengths), copies))
        return self._marks[-1]

    def trim(self, mark: Mark) -> None:
        """Return to a mark; later marks are gone.

        Raises
        ------
        DomainError
            If the mark was not set in this cache, or lies behind one that was returned to.
        """
        if mark not in self._marks:
            message = f"mark must be a live mark of this cache, got one at lengths {mark.lengths}; a KDA state has no other way back"
            raise DomainError(message)
        del self._marks[self._marks.index(mark) + 1 :]
        for layer, memory in mark.memories.items():
            for kept, found in zip(self.memories[layer], memory, strict=True):
                kept.copy_(found)
        self._set_lengths(mark.lengths)

    def num_bytes(self) -> int:
        """Return the bytes that the sequences take, whole pages counted; a shared page counts once."""
        states = sum(x.nbytes for memory in self.memories.values() for x in memory)
        page = self.pages.pool[:, :1].nbytes if len(self.pages.users) else 0
        return states + page * len({page for table in self.tables for page in table})

    def save(self, path: Path | str) -> None:
        """Write one safetensors file."""
        tensors = {
            f"kda.{layer}.{name}": x.contiguous()
            for layer, memory in self.memories.items()
            for name, x in zip(KdaMemory._fields, memory, strict=True)
        }
        for n, (table, length) in enumerate(zip(self.tables, self.lengths, strict=True)):
            index = torch.tensor(table, dtype=torch.int64, device=self.device)
            tensors[f"latents.{n}"] = self.pages.pool[:, index].flatten(1, 2)[:, :length].contiguous()
        save_file(tensors, path, metadata={"lengths": json.dumps(self.lengths), "page_len": str(self.pages.page_len)})

    @classmethod
    def load(cls, path: Path | str, config: KimiLinearConfig, device: torch.device | str = "cpu") -> Cache:
        """Read a file of ``save``.

        Raises
        ------
        DomainError
            If the file is of a model with other layers or widths.
        """
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        lengths = json.loads(metadata["lengths"])
        dtype = next((x.dtype for name, x in tensors.items() if not name.endswith(".state")), torch.float32)
        made = cls(config, len(lengths), dtype=dtype, device=device, page_len=int(metadata["page_len"]))
        expected = {
            f"kda.{layer}.{name}": x for layer, memory in made.memories.items() for name, x in memory._asdict().items()
        }
        width = made.pages.pool.shape[-1]
        shapes = {name: tuple(x.shape) for name, x in expected.items()}
        shapes |= {f"latents.{n}": (len(made._full), length, width) for n, length in enumerate(lengths)}
        found = {name: tuple(x.shape) for name, x in tensors.items()}
        if shapes != found:
            wrong = min(set(shapes.items()) ^ set(found.items()))
            message = f"file must hold the cache of this model, got {wrong[0]} of shape {wrong[1]} in one of them only; pass its config"
            raise DomainError(message)
        for name, kept in expected.items():
            kept.copy_(tensors[name])
        for n, (table, length) in enumerate(zip(made.tables, lengths, strict=True)):
            made._make_room(table, 0, length)
            for start, page in zip(range(0, length, made.pages.page_len), table, strict=False):
                part = tensors[f"latents.{n}"][:, start : start + made.pages.page_len]
                made.pages.pool[:, page, : part.shape[1]] = part
        made._set_lengths(lengths)
        return made


def _empty_memory(config: KimiLinearConfig, num: int, dtype: torch.dtype, device: torch.device) -> KdaMemory:
    width, taps = config.kda_head_width, config.conv_width - 1 if config.short_convolution else 0
    state = torch.zeros(
        num, config.num_value_heads, width, width, dtype=torch.promote_types(dtype, torch.float32), device=device
    )
    channels = (config.kda_num_heads, config.kda_num_heads, config.num_value_heads)
    return KdaMemory(state, *(torch.zeros(num, taps, heads * width, dtype=dtype, device=device) for heads in channels))


def _release(pages: LatentPages, tables: list[list[int]]) -> None:
    for table in tables:
        while table:
            pages.release(table.pop())
