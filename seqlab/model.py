"""Tokens to logits: embedding, backbone and language head put together from one config."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from seqlab.backbones.bidirectional import BidirectionalMamba
from seqlab.backbones.mamba import BackboneConfig, Mamba
from seqlab.backbones.strand import ReverseComplementEquivariant
from seqlab.heads.language import LanguageHead


@dataclass(frozen=True)
class ModelConfig(BackboneConfig):
    """A language model: a backbone, its vocabulary and what it does about the two strands of DNA.

    strand: single       the sequence as given
            augment      training reverse-complements half of the windows; a bidirectional model is evaluated on both
                         strands and the two answers averaged (Caduceus-Ph)
            equivariant  parameters shared between strands (Caduceus-PS): exactly equivariant; bidirectional only
    """

    vocab_size: int = 16  # 12 symbols, padded to a multiple of 8
    strand: Literal["single", "augment", "equivariant"] = "single"
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strand == "equivariant" and self.direction == "causal":
            raise ValueError(
                "strand: equivariant needs direction: bidirectional (the reverse complement of a causal model reads "
                "the future); use strand: augment with direction: causal"
            )
        if self.vocab_size < 12:
            raise ValueError(f"vocab_size: must be 12 or more, got {self.vocab_size}")


class LanguageModel(nn.Module):
    """ids (b l) -> logits (b l vocab), carrying the backbone's state: forward(ids, state, mask) -> (logits, state)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        backbone = Mamba if config.direction == "causal" else BidirectionalMamba
        self.backbone = backbone(config)
        tied = self.embedding if config.tie_embeddings else None
        self.lm_head = LanguageHead(config.d_model, config.vocab_size, tied_to=tied)

    def forward(self, ids: Tensor, state=None, mask: Tensor | None = None, return_state: bool = True):
        x = self.dropout(self.embedding(ids.long()))
        y, state = self.backbone(x, state, mask, return_state=return_state)
        return self.lm_head(y), state


def build_model(config: ModelConfig, complement: Tensor | None = None) -> nn.Module:
    """The language model of a config; `complement` (vocab) is the tokenizer's, needed for strand: equivariant."""
    model = LanguageModel(config)
    if config.strand != "equivariant":
        return model
    if complement is None:
        raise ValueError("strand: equivariant needs the tokenizer's complement table")
    identity = torch.arange(config.vocab_size)
    identity[: len(complement)] = complement[: config.vocab_size]
    return ReverseComplementEquivariant(model, identity)


def language_model(model: nn.Module) -> LanguageModel:
    """The LanguageModel inside whatever `build_model` returned."""
    return model.model if isinstance(model, ReverseComplementEquivariant) else model
