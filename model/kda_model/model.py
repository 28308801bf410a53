"""The hybrid model [KL section 4]: linear and full attention in turns, pre-norm, residual, dense or expert MLPs.

    x += mixer(norm(x));   x += mlp(norm(x))        in every layer;   logits = lm_head(norm(x))

Modules bear the released names. Constructing a model leaves its parameters uninitialised: :func:`initialise` draws them, and
:mod:`kda_model.checkpoint` loads them, so that neither can undo the other. Dimension letters: B rows, T tokens, D model width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

import torch
from kda_reference.errors import DomainError, DtypeError
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from kda_model.cache import Cache
from kda_model.experts import Experts, MixtureOfExperts, Router, SwiGLU
from kda_model.kda_layer import KdaLayer, KdaMemory
from kda_model.latent_attention import LatentAttention
from kda_model.norms import RMSNorm
from kda_model.operators import Operator, OperatorLike, find_operator
from kda_model.recompute import without_counting_twice
from kda_model.short_convolution import ShortConvolution

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from kda_model.config import KimiLinearConfig
    from kda_model.packing import Packing


class DecoderLayer(nn.Module):
    """One mixer and one MLP."""

    def __init__(self, config: KimiLinearConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = KdaLayer(config) if config.layers[index] == "kda" else LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.is_dense(index):
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        else:
            self.block_sparse_moe = MixtureOfExperts(config)

    @property
    def feed_forward(self) -> nn.Module:
        """Return the MLP, whichever it is."""
        found: nn.Module = self.mlp if hasattr(self, "mlp") else self.block_sparse_moe
        return found

    def forward(
        self, x_BTD: Tensor, operator: Operator, positions: Tensor | None, packing: Packing | None, cache: Cache | None
    ) -> tuple[Tensor, KdaMemory | None]:
        """Apply the layer; return the residual stream and, with a cache, the new memory of a KDA layer."""
        normalised, memory = self.input_layernorm(x_BTD), None
        if isinstance(self.self_attn, KdaLayer):
            known = None if cache is None else cache.memories[self.index]
            mixed, memory = self.self_attn(normalised, operator, packing, known)
        else:
            view = None if cache is None else cache.view(self.index)
            mixed = self.self_attn(normalised, positions, packing, view)
        x_BTD = x_BTD + mixed
        return x_BTD + self.feed_forward(self.post_attention_layernorm(x_BTD)), memory


class Decoder(nn.Module):
    """Embedding, layers and last norm: what the released names call ``model``."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class KimiLinear(nn.Module):
    """The language model.

    Parameters
    ----------
    config
        Sizes and switches.
    operator
        Who computes the recurrence; see :func:`kda_model.operators.find_operator`.

    Attributes
    ----------
    recompute
        Whether a training step keeps only the input of each layer and computes the rest again for the gradient.
    """

    def __init__(self, config: KimiLinearConfig, operator: OperatorLike = None) -> None:
        super().__init__()
        self.config = config
        self.operator = operator
        self.recompute = False
        self.model = Decoder(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        """Return where the parameters are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of activations: that of the embedding."""
        return self.model.embed_tokens.weight.dtype

    @property
    def head(self) -> Tensor:
        """Return the output embedding ``[vocabulary, D]``."""
        found: Tensor = self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight
        return found

    def new_cache(self, num_sequences: int, page_len: int = 64) -> Cache:
        """Return an empty cache for sequences of this model."""
        return Cache(self.config, num_sequences, dtype=self.dtype, device=self.device, page_len=page_len)

    def forward(self, tokens_BT: Tensor, packing: Packing | None = None, cache: Cache | None = None) -> Tensor:
        """Return the logits ``[B, T, vocabulary]`` of the token after each one; see :meth:`hidden`."""
        return linear(self.hidden(tokens_BT, packing, cache), self.head)

    def hidden(self, tokens_BT: Tensor, packing: Packing | None = None, cache: Cache | None = None) -> Tensor:
        """Return the last residual stream, normalised.

        Parameters
        ----------
        tokens_BT
            Token ids, int64, each in ``0..vocab_size - 1``.
        packing
            Sequences of any lengths in one row; ``None`` means one sequence a row.
        cache
            Earlier tokens of each sequence, to which these are added; ``None`` means that sequences begin here. Without gradient.

        Raises
        ------
        DomainError
            If the cache has another number of sequences, or a gradient is asked for through one.
        DtypeError
            If the tokens are no integers.
        """
        self.check_tokens(tokens_BT, packing)
        if cache is not None and torch.is_grad_enabled():
            message = "cache must be None where gradients are recorded, got one; call under torch.no_grad()"
            raise DomainError(message)
        operator = find_operator(self.operator, self.device)
        if cache is not None:
            positions: Tensor | None = cache.open(tokens_BT, packing)
        elif self.config.use_nope:
            positions = None
        else:
            positions = (
                torch.arange(tokens_BT.shape[1], device=self.device)[None] if packing is None else packing.positions
            )
        x_BTD = self.model.embed_tokens(tokens_BT)
        memories: dict[int, KdaMemory] = {}
        for index, layer in enumerate(self.model.layers):
            arguments = (x_BTD, operator, positions, packing, cache)
            if self.recompute and self.training and torch.is_grad_enabled():
                x_BTD, memory = checkpoint(
                    layer, *arguments, use_reentrant=False, context_fn=without_counting_twice(layer)
                )
            else:
                x_BTD, memory = layer(*arguments)
            if memory is not None:
                memories[index] = memory
        if cache is not None:
            cache.close(memories)
        normalised: Tensor = self.model.norm(x_BTD)
        return normalised

    def check_tokens(self, tokens_BT: Tensor, packing: Packing | None) -> None:
        """Refuse tokens that no embedding or packing covers; values are read where that costs no synchronisation."""
        if tokens_BT.dtype not in (torch.int64, torch.int32):
            message = f"tokens must be int64, got {tokens_BT.dtype}; convert them"
            raise DtypeError(message)
        if packing is not None:
            packing.check(tokens_BT)
        if tokens_BT.device.type == "cpu" and tokens_BT.numel():
            low, high = int(tokens_BT.min()), int(tokens_BT.max())
            if low < 0 or high >= self.config.vocab_size:
                message = f"tokens must lie in 0..{self.config.vocab_size - 1}, got {low if low < 0 else high}; check the tokeniser"
                raise DomainError(message)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, packing: Packing | None = None, chunk: int = 8192) -> Tensor:
        """Return the mean negative log likelihood of the targets (nats), logits computed some tokens at a time.

        Parameters
        ----------
        tokens_BT, packing
            As in :meth:`hidden`.
        targets_BT
            The token to be predicted at each place; negative means that the place does not count.
        chunk
            Tokens whose logits are held at once; they are computed again for the gradient.
        """
        hidden, targets = self.hidden(tokens_BT, packing).flatten(0, 1), targets_BT.flatten()
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            if hidden.shape[0] > chunk and torch.is_grad_enabled():
                total = total + checkpoint(_sum_of_losses, part, self.head, wanted, use_reentrant=False)
            else:
                total = total + _sum_of_losses(part, self.head, wanted)
        return total / (targets >= 0).sum().clamp_min(1)

    def routers(self) -> Iterator[Router]:
        """Yield the router of each layer that has experts."""
        for module in self.modules():
            if isinstance(module, Router):
                yield module

    def balance_routers(self, rate: float) -> None:
        """Move every router's bias towards an even load; once after each training step."""
        for router in self.routers():
            router.balance(rate)

    def cast(self, dtype: torch.dtype) -> Self:
        """Convert the parameters, all but those that stay float32: norms, gates and the routers' bias."""
        for name, parameter in (*self.named_parameters(), *self.named_buffers()):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(
                    torch.promote_types(dtype, torch.float32) if stays_float32(name) else dtype
                )
        return self


def stays_float32(name: str) -> bool:
    """Return whether a parameter stays float32 in a 16-bit model, and takes no weight decay: its updates are too small to round."""
    return name.endswith(("A_log", "dt_bias", "norm.weight", "e_score_correction_bias"))


def _sum_of_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = linear(hidden, head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, targets.clamp_min(-1), ignore_index=-1, reduction="sum")


@torch.no_grad()
def initialise(model: KimiLinear, seed: int) -> KimiLinear:
    """Draw all parameters: matrices normal, gates as the report has them, norms one, biases of routers zero.

    ``A_log = log U(1, 16)``; ``dt_bias`` is the inverse softplus of ``exp U(log 1e-3, log 1e-1)``, at least 1e-4.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    std = model.config.initializer_range
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, Router)):
            module.weight.normal_(0, std, generator=generator)
        elif isinstance(module, ShortConvolution):
            bound = module.weight.shape[-1] ** -0.5
            module.weight.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, Experts):
            for weight in (module.w1, module.w3, module.w2):
                weight.normal_(0, std, generator=generator)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1)
        elif isinstance(module, KdaLayer):
            module.A_log.uniform_(1, 16, generator=generator).log_()
            dt = module.dt_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_().clamp_min(1e-4)
            module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        if isinstance(module, Router):
            module.e_score_correction_bias.zero_()
    return model
