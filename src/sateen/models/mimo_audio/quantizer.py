"""Residual vector quantisation: each stage codes what the stages before it left over.

Codebooks are buffers and move by running averages of the vectors they were chosen for, never by gradients.
Legend: B clips, L tokens, P vectors (clips and tokens together), D width, R stages, C entries of a codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sateen.errors import ShapeError

KMEANS_STEPS = 50
DECAY = 0.99  # of the running averages
SMOOTHING = 1e-5  # Laplace smoothing of the cluster sizes
# An entry is dead below the published threshold or below this share of the mean use, whichever is less. The
# published threshold of 2 suits batches of thousands of tokens; with hundreds it would replace entries that
# are used as often as they can be (source: ours).
DEAD_SHARE = 0.1


class Quantized(NamedTuple):
    """Attributes:
    vectors_BLD: what the codes stand for; its gradient passes straight to the input.
    codes_BRL: int64.
    commitment: mean over stages of the mean squared distance to the chosen entries, a scalar.
    """

    vectors_BLD: Tensor
    codes_BRL: Tensor
    commitment: Tensor


class Codebook(nn.Module):
    """The entries of one stage, under the published buffer names.

    Attributes:
        embed: the entries [C, D].
        embed_avg: running sums of the vectors each entry was chosen for.
        cluster_size: running counts [C].
        inited: 1 once k-means has set the entries.
    """

    inited: Tensor
    cluster_size: Tensor
    embed: Tensor
    embed_avg: Tensor

    def __init__(self, num_entries: int, width: int):
        super().__init__()
        self.register_buffer("inited", torch.zeros(1))
        self.register_buffer("cluster_size", torch.zeros(num_entries))
        self.register_buffer("embed", torch.zeros(num_entries, width))
        self.register_buffer("embed_avg", torch.zeros(num_entries, width))

    def nearest(self, x_PD: Tensor) -> Tensor:
        """The code [P] of each vector's nearest entry; of equally near ones the first."""
        negated = -(x_PD.square().sum(1, keepdim=True) - 2 * x_PD @ self.embed.T + self.embed.square().sum(1))
        return negated.argmax(dim=1)

    @torch.no_grad()
    def initialize(self, x_PD: Tensor, generator: torch.Generator) -> None:
        """Sets the entries to the means of a k-means over the vectors, from random ones of them."""
        self.embed.copy_(_draw(x_PD, len(self.embed), generator))
        for _ in range(KMEANS_STEPS):
            counts_C, sums_CD = self._totals(x_PD)
            # An entry that no vector is nearest to stays where it is.
            self.embed.copy_(
                torch.where(counts_C[:, None] > 0, sums_CD / counts_C.clamp_min(1)[:, None], self.embed)
            )
        counts_C, _ = self._totals(x_PD)
        self.cluster_size.copy_(counts_C)
        self.embed_avg.copy_(self.embed * counts_C[:, None])
        self.inited.fill_(1)

    @torch.no_grad()
    def update(self, x_PD: Tensor, threshold: float, generator: torch.Generator) -> int:
        """One step of the running averages; dead entries are replaced first. Returns how many were dead."""
        mean_use = len(x_PD) / len(self.embed)
        dead = (self.cluster_size < min(threshold, DEAD_SHARE * mean_use)).nonzero()[:, 0]
        counts_C, sums_CD = self._totals(x_PD)
        if len(dead):
            # The averages are set too: entries are made from them below, so a replacement of the entry alone
            # would not outlive this step. A new entry counts as one of mean use (source: ours).
            fresh = _draw(x_PD, len(dead), generator)
            self.cluster_size[dead] = mean_use
            self.embed_avg[dead] = fresh * mean_use
        self.cluster_size.lerp_(counts_C, 1 - DECAY)
        self.embed_avg.lerp_(sums_CD, 1 - DECAY)
        total = self.cluster_size.sum()
        smoothed_C = (self.cluster_size + SMOOTHING) / (total + len(self.embed) * SMOOTHING) * total
        self.embed.copy_(self.embed_avg / smoothed_C[:, None])
        return len(dead)

    def _totals(self, x_PD: Tensor) -> tuple[Tensor, Tensor]:
        """How many vectors chose each entry, and their sums."""
        codes_P = self.nearest(x_PD)
        sums_CD = torch.zeros_like(self.embed).index_add_(0, codes_P, x_PD)
        return torch.bincount(codes_P, minlength=len(self.embed)).to(x_PD.dtype), sums_CD


class ResidualQuantizer(nn.Module):
    """R codebooks in the full width, plain Euclidean distance, in float32 whatever the model's dtype.

    Source: MiMo-Audio §2.1.1 and its published modules, whose nesting gives the names
    `vq.layers.{r}._codebook.*`.
    """

    def __init__(self, codebook_size: Sequence[int], width: int):
        super().__init__()
        stages = (nn.ModuleDict({"_codebook": Codebook(size, width)}) for size in codebook_size)
        self.vq = nn.ModuleDict({"layers": nn.ModuleList(stages)})

    @property
    def codebooks(self) -> list[Codebook]:
        stages = cast(nn.ModuleList, self.vq["layers"])
        return [cast(Codebook, cast(nn.ModuleDict, stage)["_codebook"]) for stage in stages]

    @property
    def is_initialized(self) -> bool:
        return all(bool(codebook.inited.item()) for codebook in self.codebooks)

    def forward(self, hidden_BLD: Tensor, num_quantizers: int | None = None) -> Quantized:
        """The vectors through the first stages, all when None; differentiable.

        A stage's commitment pulls on its own residual: residuals are taken from the quantised sum without its
        gradient, since with it the later stages' losses would cancel in the input.
        """
        x_PD = hidden_BLD.float().flatten(0, 1)
        total_PD = torch.zeros_like(x_PD)
        codes, losses = [], []
        for codebook in self._leading(num_quantizers):
            residual_PD = x_PD - total_PD
            code_P = codebook.nearest(residual_PD.detach())
            chosen_PD = codebook.embed[code_P]
            codes.append(code_P)
            losses.append(F.mse_loss(residual_PD, chosen_PD))
            total_PD = total_PD + chosen_PD
        vectors_PD = x_PD + (total_PD - x_PD).detach()
        codes_BRL = torch.stack(codes).unflatten(1, hidden_BLD.shape[:2]).transpose(0, 1)
        return Quantized(
            vectors_PD.view(hidden_BLD.shape).to(hidden_BLD.dtype), codes_BRL, torch.stack(losses).mean()
        )

    @torch.no_grad()
    def encode(self, hidden_PD: Tensor, num_quantizers: int | None = None) -> Tensor:
        """Codes [R, P], int64."""
        residual_PD = hidden_PD.float()
        codes = []
        for codebook in self._leading(num_quantizers):
            codes.append(codebook.nearest(residual_PD))
            residual_PD = residual_PD - codebook.embed[codes[-1]]
        return torch.stack(codes)

    def decode(self, codes_RP: Tensor) -> Tensor:
        """The vectors [P, D] that the codes of the leading stages stand for, in float32.

        Raises:
            ShapeError: not [R, P] with 1 <= R <= stages, or a code outside its codebook.
        """
        books = self.codebooks
        if codes_RP.ndim != 2 or not 1 <= len(codes_RP) <= len(books):
            raise ShapeError(
                f"codes of shape {tuple(codes_RP.shape)}; accepted: [1 to {len(books)} stages, tokens]"
            )
        codes_RP = codes_RP.long()
        for r, (codebook, code_P) in enumerate(zip(books, codes_RP, strict=False)):
            if len(code_P) and not 0 <= int(code_P.min()) <= int(code_P.max()) < len(codebook.embed):
                raise ShapeError(
                    f"stage {r}: codes from {int(code_P.min())} to {int(code_P.max())}; "
                    f"accepted: 0 to {len(codebook.embed) - 1}"
                )
        return torch.stack([book.embed[code_P] for book, code_P in zip(books, codes_RP, strict=False)]).sum(0)

    @torch.no_grad()
    def update(self, hidden_PD: Tensor, threshold: float, generator: torch.Generator) -> list[int]:
        """Moves every codebook by one batch, or sets it by k-means; how many entries of each were dead."""
        residual_PD = hidden_PD.detach().float()
        replaced = []
        for codebook in self.codebooks:
            if codebook.inited.item():
                # As in a training step: the residual is of the entries that coded this batch.
                chosen_PD = codebook.embed[codebook.nearest(residual_PD)]
                replaced.append(codebook.update(residual_PD, threshold, generator))
            else:
                codebook.initialize(residual_PD, generator)
                chosen_PD = codebook.embed[codebook.nearest(residual_PD)]
                replaced.append(0)
            residual_PD = residual_PD - chosen_PD
        return replaced

    def _leading(self, num_quantizers: int | None) -> list[Codebook]:
        books = self.codebooks
        if num_quantizers is None:
            return books
        if not 1 <= num_quantizers <= len(books):
            raise ShapeError(f"num_quantizers {num_quantizers} (accepted: 1 to {len(books)})")
        return books[:num_quantizers]


def _draw(x_PD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the vectors, each at most once where there are enough."""
    P = len(x_PD)
    device = generator.device
    if count <= P:
        rows = torch.randperm(P, generator=generator, device=device)[:count]
    else:
        rows = torch.randint(P, (count,), generator=generator, device=device)
    return x_PD[rows.to(x_PD.device)]
