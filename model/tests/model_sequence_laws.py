"""Laws of sequences: prefill and decode, packing, batches, caches, generation; each a function of the package."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from kda_reference.errors import DomainError
from model_cases import F64, close, made, random_tokens

MIXED_LENGTHS = (7, 1, 0, 3, 2, 12, 4)


def prefill_then_decode_is_the_whole(kda: Any) -> None:
    """At every split, with prompts shorter than the convolution's kernel too."""
    for preset in ("tiny", "tiny-grouped-values"):
        model, tokens = made(kda, kda.preset(preset), dtype=F64), random_tokens(2, 11)
        with torch.no_grad():
            whole = model(tokens)
            for split in (1, 2, 3, 4, 9):
                cache = model.new_cache(2, page_len=4)
                parts = [model(tokens[:, :split], cache=cache)]
                parts += [model(tokens[:, t : t + 1], cache=cache) for t in range(split, 11)]
                close(torch.cat(parts, 1), whole)
                assert cache.lengths == [11, 11] == cache.device_lengths.tolist()


def prefill_in_chunks_is_prefill(kda: Any) -> None:
    """Of ragged prompts, each chunk length, those that pages and kernels do not divide included."""
    model = made(kda, kda.preset("tiny"), dtype=F64)
    prompts = [random_tokens(n, seed=n).tolist() for n in (9, 1, 14, 3)]
    with torch.no_grad():
        ends = [model(torch.tensor([prompt]))[0, -1] for prompt in prompts]
        for chunk in (1, 2, 5, 64):
            cache = model.new_cache(4, page_len=4)
            close(kda.generate.prefill(model, prompts, cache, chunk), torch.stack(ends))
            assert cache.lengths == [9, 1, 14, 3]


def one_token_of_one_sequence_decodes(kda: Any) -> None:
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(1, 3)
    with torch.no_grad():
        cache = model.new_cache(1)
        parts = [model(tokens[:, t : t + 1], cache=cache) for t in range(3)]
        assert parts[0].shape == (1, 1, 64)
        close(torch.cat(parts, 1), model(tokens))


def packed_sequences_are_separate_sequences(kda: Any) -> None:
    """Forward, and the gradient of a loss on all; attention, state and convolution leak nothing."""
    for preset in ("tiny", "tiny-grouped-values"):
        model = made(kda, kda.preset(preset), dtype=F64)
        rows = [random_tokens(n, seed=n).tolist() for n in MIXED_LENGTHS]
        tokens, packing = kda.pack(rows, torch.device("cpu"))
        packed = model(tokens, packing)
        weights = torch.randn(packed.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
        (packed * weights).sum().backward()
        together = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        for row, part in zip(rows, packing.slices(), strict=True):
            if row:
                alone = model(torch.tensor([row]))
                close(packed[:, part].detach(), alone.detach())
                (alone * weights[:, part]).sum().backward()
        for found, parameter in zip(together, model.parameters(), strict=True):
            close(found, parameter.grad)


def rows_of_a_batch_are_independent(kda: Any) -> None:
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(3, 9)
    with torch.no_grad():
        together = model(tokens)
        for row in range(3):
            close(together[row : row + 1], model(tokens[row : row + 1]))
        changed = tokens.clone()
        changed[1] = (changed[1] + 1) % 64
        close(model(changed)[[0, 2]], together[[0, 2]])


def later_tokens_change_nothing_before_them(kda: Any) -> None:
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(1, 20)
    with torch.no_grad():
        before = model(tokens)
        for place in (1, 7, 19):
            changed = tokens.clone()
            changed[0, place:] = (changed[0, place:] + 1) % 64
            close(model(changed)[:, :place], before[:, :place])


def decode_rows_do_not_see_each_other(kda: Any) -> None:
    """Not even NaN passes from one sequence's memory to another, or from the unused end of a page into a value."""
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(2, 8)
    with torch.no_grad():
        clean, dirty = (model.new_cache(2, page_len=4) for _ in range(2))
        model(tokens[:, :6], cache=clean)
        model(tokens[:, :6], cache=dirty)
        dirty.pages.pool[:, [table[-1] for table in dirty.tables], 2:] = torch.nan
        unused = set(range(len(dirty.pages.users))) - {page for table in dirty.tables for page in table}
        dirty.pages.pool[:, sorted(unused)] = torch.nan
        for t in (6, 7):
            close(model(tokens[:, t : t + 1], cache=dirty), model(tokens[:, t : t + 1], cache=clean))
        for memory in dirty.memories.values():
            memory.state[0] = torch.nan
        found = model(tokens[:, :1], cache=dirty)
        assert bool(found[0].isnan().all())
        close(found[1], model(tokens[:, :1], cache=clean)[1])
        dirty.reset()
        clean.reset()
        assert dirty.lengths == [0, 0] == dirty.device_lengths.tolist()
        close(model(tokens, cache=dirty), model(tokens))


def full_attention_knows_no_positions(kda: Any) -> None:
    """Earlier tokens of one layer may be exchanged; with rotated keys they may not, but all may move together."""
    config = kda.preset("tiny-dense").replace(num_layers=1, num_dense_layers=1).with_ratio(0)
    model, tokens = made(kda, config, dtype=F64), random_tokens(1, 8)
    exchanged = tokens[:, [3, 0, 5, 1, 2, 4, 6, 7]]
    with torch.no_grad():
        close(model(exchanged)[:, 6:], model(tokens)[:, 6:])
        rotated = made(kda, config.replace(use_nope=False), dtype=F64)
        rotated.load_state_dict(model.state_dict())
        assert not torch.allclose(rotated(exchanged)[:, 6:], rotated(tokens)[:, 6:])
        x = torch.randn(1, 8, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
        attention, places = rotated.model.layers[0].self_attn, torch.arange(8)[None]
        close(attention(x, places), attention(x, places + 1000))
        cache = rotated.new_cache(1, page_len=4)
        parts = [rotated(tokens[:, :5], cache=cache)]
        parts += [rotated(tokens[:, t : t + 1], cache=cache) for t in (5, 6, 7)]
        close(torch.cat(parts, 1), rotated(tokens))
        row, packing = kda.pack([tokens[0, :3].tolist(), tokens[0].tolist()], torch.device("cpu"))
        close(rotated(row, packing)[:, 3:], rotated(tokens))


def forks_and_marks_keep_what_they_had(kda: Any) -> None:
    """Forks share pages until one writes; a mark leads back; a file holds the cache bit for bit; memory is given back."""
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(2, 16)
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache(2, page_len=4)
        model(tokens[:, :6], cache=cache)
        fork, turned = cache.fork(), cache.fork([1, 1, 0])
        assert fork.tables == cache.tables
        mark = cache.mark()
        close(model(tokens[:, 6:9], cache=cache), whole[:, 6:9])
        model((tokens[:, 6:13] + 1) % 64, cache=fork)
        close(model(tokens[:, 9:10], cache=cache), whole[:, 9:10])
        close(model(tokens[[1, 1, 0], 6:7], cache=turned), whole[[1, 1, 0], 6:7])
        later = cache.mark()
        cache.trim(mark)
        assert cache.lengths == [6, 6] == cache.device_lengths.tolist()
        close(model(tokens[:, 6:16], cache=cache), whole[:, 6:16])
        cache.trim(mark)
        for dead in (later, fork.mark()):
            with pytest.raises(DomainError, match="live mark"):
                cache.trim(dead)
        with tempfile.TemporaryDirectory() as folder:
            turned.save(Path(folder) / "cache.safetensors")
            resumed = kda.Cache.load(Path(folder) / "cache.safetensors", model.config)
        assert resumed.lengths == turned.lengths == [7, 7, 7]
        following = tokens[[1, 1, 0], 7:8]
        assert torch.equal(model(following, cache=resumed), model(following, cache=turned))
        used = sum(users > 0 for users in cache.pages.users)
        del fork
        assert sum(users > 0 for users in cache.pages.users) < used
        cache.reset()
        turned.reset()
        assert not any(cache.pages.users)


def decode_steps_depend_on_the_device_alone(kda: Any) -> None:
    """What a CUDA graph repeats is a step as the host saw it once: with the host's counts left behind, steps stay right."""
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(2, 14)
    with torch.no_grad():
        whole, cache = model(tokens), model.new_cache(2, page_len=4)
        model(tokens[:, :3], cache=cache)
        cache.reserve(11)
        table = cache.table
        for t in range(3, 14):
            cache.lengths = [3, 3]
            close(model(tokens[:, t : t + 1], cache=cache), whole[:, t : t + 1])
        assert cache.table is table
        assert cache.device_lengths.tolist() == [14, 14]


def failed_calls_leave_the_cache_as_it_was(kda: Any) -> None:
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(2, 8)

    def fails(*_args: Any, **_options: Any) -> Any:
        message = "no"
        raise RuntimeError(message)

    with torch.no_grad():
        cache = model.new_cache(2, page_len=4)
        model(tokens[:, :4], cache=cache)
        working = model.model.layers[3].self_attn.forward
        model.model.layers[3].self_attn.forward = fails
        with pytest.raises(RuntimeError, match="no"):
            model((tokens[:, 4:] + 1) % 64, cache=cache)
        model.model.layers[3].self_attn.forward = working
        close(model(tokens[:, 4:], cache=cache), model(tokens)[:, 4:])


def generated_tokens_are_those_of_the_whole_model(kda: Any) -> None:
    """Greedy, each sequence as if alone; stopped by a token; streamed in order; the given cache holds the prompts."""
    model = made(kda, kda.preset("tiny"))
    prompts = [random_tokens(n, seed=n).tolist() for n in (5, 1, 8)]
    streamed: list[tuple[int, int]] = []
    cache = model.new_cache(3)
    found = kda.generate.generate(
        model,
        prompts,
        max_new_tokens=6,
        prefill_chunk=3,
        cache=cache,
        on_token=lambda row, token: streamed.append((row, token)),
    )
    assert cache.lengths == [5, 1, 8]
    for row, (prompt, new) in enumerate(zip(prompts, found, strict=True)):
        assert [token for place, token in streamed if place == row] == new
        assert len(new) == 6
        text = torch.tensor([prompt + new])
        with torch.no_grad():
            expected = model(text)[0].argmax(-1)[len(prompt) - 1 : -1]
        assert expected.tolist() == new
    again = kda.generate.generate(model, prompts, max_new_tokens=6, stop={found[1][2]})
    assert again[1] == found[1][: found[1].index(found[1][2]) + 1]
    for row in (0, 2):
        cut = next((i + 1 for i, token in enumerate(found[row]) if token == found[1][2]), 6)
        assert again[row] == found[row][:cut]


def drawn_tokens_do_not_depend_on_neighbours(kda: Any) -> None:
    model = made(kda, kda.preset("tiny"))
    prompts = [random_tokens(n, seed=n).tolist() for n in (5, 1, 8)]
    sampling = kda.sampling.Sampling(temperature=1.5, top_p=0.9, seed=4)
    together = kda.generate.generate(model, prompts, max_new_tokens=6, sampling=sampling)
    for row, prompt in enumerate(prompts):
        own = kda.sampling.Sampling(temperature=1.5, top_p=0.9, seed=4 + row)
        assert kda.generate.generate(model, [prompt], max_new_tokens=6, sampling=own) == [together[row]]
    cold = kda.sampling.Sampling(temperature=1e-6)
    greedy = kda.generate.generate(model, prompts, max_new_tokens=6)
    assert kda.generate.generate(model, prompts, max_new_tokens=6, sampling=cold) == greedy


def draws_follow_the_probabilities_of_the_nucleus(kda: Any) -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.05, 0.2]], dtype=F64).log()
    sampler = kda.sampling.Sampler(kda.sampling.Sampling(temperature=1.0, top_p=0.69, seed=0), 1)
    drawn = torch.tensor([sampler.draw(logits, [0])[0] for _ in range(4000)])
    share = torch.bincount(drawn, minlength=5) / 4000
    torch.testing.assert_close(share, torch.tensor([0, 5 / 7, 0, 0, 2 / 7]), rtol=0, atol=0.03)
    narrow = kda.sampling.Sampler(kda.sampling.Sampling(temperature=1.0, top_p=1e-9), 1)
    assert {narrow.draw(logits, [0])[0] for _ in range(20)} == {1}
