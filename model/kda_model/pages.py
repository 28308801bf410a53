"""Latents of full-attention layers, in pages that sequences own or share.

A page holds the latents of ``page_len`` consecutive tokens of one sequence, in every full-attention layer. Forked sequences
share pages; a page that is shared is copied before it is written to. What lies in a page behind its last token is never
read as a value. Dimension letters: M full-attention layers, N sequences, T new tokens, L tokens so far, W pages in the widest table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class LatentPages:
    """The pool of pages and who uses them.

    Attributes
    ----------
    pool
        ``[M, pages, page_len, width]``.
    users
        Number of tables that list each page.
    """

    def __init__(self, num_layers: int, page_len: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.pool = torch.zeros(num_layers, 0, page_len, width, dtype=dtype, device=device)
        self.users: list[int] = []
        self._free: list[int] = []

    @property
    def page_len(self) -> int:
        """Return the tokens of a page."""
        return self.pool.shape[2]

    def new_page(self) -> int:
        """Return a page that nobody uses, with one user."""
        if not self._free:
            self.grow(max(8, len(self.users)))
        page = self._free.pop()
        self.users[page] = 1
        return page

    def grow(self, number: int) -> None:
        """Add free pages."""
        start = len(self.users)
        more = self.pool.new_zeros(self.pool.shape[0], number, *self.pool.shape[2:])
        self.pool = torch.cat([self.pool, more], 1)
        self.users += [0] * number
        self._free += reversed(range(start, start + number))

    def share(self, page: int) -> None:
        """Count one more user."""
        self.users[page] += 1

    def release(self, page: int) -> None:
        """Count one user less; a page without any is free."""
        self.users[page] -= 1
        if not self.users[page]:
            self._free.append(page)

    def owned(self, page: int) -> int:
        """Return the page, or a copy of it if others use it too."""
        if self.users[page] == 1:
            return page
        copy = self.new_page()
        self.pool[:, copy] = self.pool[:, page]
        self.release(page)
        return copy


@dataclass(frozen=True)
class LatentView:
    """One layer's latents during one call.

    Attributes
    ----------
    layer
        Its place among the full-attention layers.
    tables
        Pages of each sequence.
    table
        The same on the device ``[N, W]``, filled up with page 0.
    slots
        Where the call's tokens go, in tokens from the pool's beginning ``[B * T]``.
    totals
        Tokens of each sequence when the call is over, on the host, and on the device ``[N]``.
    """

    pages: LatentPages
    layer: int
    tables: list[list[int]]
    table: Tensor
    slots: Tensor
    totals: list[int]
    device_totals: Tensor

    def write(self, latents: Tensor) -> None:
        """Store the latents ``[B, T, width]`` of the call's tokens."""
        flat = self.pages.pool[self.layer].flatten(0, 1)
        flat.index_copy_(0, self.slots, latents.detach().flatten(0, 1).to(flat.dtype))

    def read(self, n: int) -> Tensor:
        """Return the latents of one sequence ``[L, width]``, the call's own included."""
        index = torch.tensor(self.tables[n], dtype=torch.int64, device=self.table.device)
        return self.pages.pool[self.layer][index].flatten(0, 1)[: self.totals[n]]

    def read_all(self) -> tuple[Tensor, Tensor]:
        """Return the latents of all sequences ``[N, W page_len, width]``, and which of them are tokens."""
        known = self.pages.pool[self.layer][self.table].flatten(1, 2)
        return known, torch.arange(known.shape[1], device=known.device) < self.device_totals[:, None]
