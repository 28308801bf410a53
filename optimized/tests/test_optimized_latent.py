"""Decoding over paged latents: the parts of a length, joined, are the attention itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from kda_optimized import latent_decode
from kda_optimized.launch import recorded
from kda_reference.errors import DomainError, DtypeError, KdaError, ShapeError
from optimized_calls import DEVICE, Calls, relative_error

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
NAN = float("nan")
RANK, SHARED = 24, 8


def paged(calls: Calls, lengths: list[int], page_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return a pool whose unused memory is NaN, a table whose unused entries are out of range, and the latents of each row."""
    most = max(-(-length // page_len) for length in lengths) + 1
    pages = torch.full((most * len(lengths) + 1, 2, page_len, RANK + SHARED), NAN, dtype=dtype, device=DEVICE)[:, 1]
    table = torch.full((len(lengths), most), 10**6, device=DEVICE)
    free = torch.randperm(len(pages), generator=calls.generator).tolist()
    known = []
    for row, length in enumerate(lengths):
        latents = calls.normal(length, RANK + SHARED).to(DEVICE, dtype)
        for start in range(0, length, page_len):
            page = free.pop()
            table[row, start // page_len] = page
            part = latents[start : start + page_len]
            pages[page, : len(part)] = part
        known.append(latents)
    return pages, table, known


def plain(q: Tensor, known: list[Tensor], scale: float) -> Tensor:
    """Return the attention of every row in float64."""
    rows = []
    for query, latents in zip(q.double(), known, strict=True):
        weights = torch.softmax(scale * query @ latents.double().T, -1)
        rows.append(weights @ latents.double()[:, :RANK])
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "page_len", "heads", "scale"),
    [([1, 37, 80], 16, 3, 0.3), ([100], 7, 1, 0.3), ([5, 33], 64, 40, 4.0)],
    ids=["three rows", "one row", "many heads"],
)
def test_parts_of_the_length_make_the_attention(
    calls: Calls, dtype: torch.dtype, lengths: list[int], page_len: int, heads: int, scale: float
) -> None:
    pages, table, known = paged(calls, lengths, page_len, dtype)
    q = calls.normal(len(lengths), heads, RANK + SHARED).to(DEVICE, dtype)
    o = latent_decode(q, pages, table, torch.tensor(lengths, device=DEVICE), latent_width=RANK, scale=scale)
    assert o.dtype == dtype
    assert relative_error(o, plain(q, known, scale)) < LIMIT[dtype]


def test_a_large_score_does_not_overflow(calls: Calls) -> None:
    pages, table, known = paged(calls, [50], 16, torch.float32)
    q = 300 * calls.normal(1, 2, RANK + SHARED).to(DEVICE)
    o = latent_decode(q, pages, table, torch.tensor([50], device=DEVICE), latent_width=RANK, scale=1.0)
    assert relative_error(o, plain(q, known, 1.0)) < 1e-3


def test_a_row_without_tokens_is_zero_and_others_do_not_mind(calls: Calls) -> None:
    pages, table, known = paged(calls, [20, 1, 20], 16, torch.float32)
    q = calls.normal(3, 2, RANK + SHARED).to(DEVICE)
    o = latent_decode(q, pages, table, torch.tensor([20, 0, 20], device=DEVICE), latent_width=RANK, scale=0.3)
    assert not o[1].any()
    assert relative_error(o[[0, 2]], plain(q[[0, 2]], [known[0], known[2]], 0.3)) < LIMIT[torch.float32]


def test_only_a_rows_own_pages_count(calls: Calls) -> None:
    pages, table, _ = paged(calls, [20, 20], 16, torch.float32)
    q, lengths = calls.normal(2, 2, RANK + SHARED).to(DEVICE), torch.tensor([20, 20], device=DEVICE)
    before = latent_decode(q, pages, table, lengths, latent_width=RANK, scale=0.3)
    pages[table[0, 0]] = NAN
    after = latent_decode(q, pages, table, lengths, latent_width=RANK, scale=0.3)
    assert torch.equal(after[1], before[1])
    assert after[0].isnan().all()


@pytest.mark.parametrize("page", [-1, 10**6])
def test_a_page_that_is_not_reads_as_zeros(calls: Calls, page: int) -> None:
    pages, table, known = paged(calls, [20], 16, torch.float32)
    q, lengths = calls.normal(1, 2, RANK + SHARED).to(DEVICE), torch.tensor([20], device=DEVICE)
    table[0, 0] = page
    known[0][:16] = 0
    o = latent_decode(q, pages, table, lengths, latent_width=RANK, scale=0.3)
    assert relative_error(o, plain(q, known, 0.3)) < LIMIT[torch.float32]


def test_nothing_is_read_by_the_host() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tables = (meta(2, 100, dtype=torch.int32), meta(2, dtype=torch.int32))
    with recorded() as started:
        o = latent_decode(meta(2, 32, 576), meta(9, 64, 576), *tables, latent_width=512, scale=0.1)
    assert o.shape == (2, 32, 512)
    assert len(started) == 2


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"pages": torch.zeros(4, 16, 31)}, ShapeError, "pages"),
        ({"pages": torch.zeros(4, 16, 32).half()}, DtypeError, "pages"),
        ({"table": torch.zeros(3, 2, dtype=torch.int64)}, ShapeError, "table"),
        ({"lengths": torch.zeros(2)}, DtypeError, "lengths"),
        ({"latent_width": 33}, DomainError, "latent_width"),
        ({"q": torch.zeros(2, 32)}, ShapeError, "q"),
    ],
    ids=["width", "half", "rows", "float lengths", "rank", "axes"],
)
def test_contradictions_are_refused_by_name(changes: dict[str, Any], error: type[KdaError], word: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 3, 32), "pages": torch.zeros(4, 16, 32), "table": torch.zeros(2, 2, dtype=torch.int64),
        "lengths": torch.zeros(2, dtype=torch.int64), "latent_width": 24, "scale": 1.0,
    }  # fmt: skip
    placed: dict[str, Any] = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in (arguments | changes).items()
    }
    with pytest.raises(error, match=word):
        latent_decode(**placed)
