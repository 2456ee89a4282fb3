"""Tokens to logits: embedding, backbone and language head put together from one config."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from seqlab.backbones import build_backbone
from seqlab.backbones.mamba import BackboneConfig
from seqlab.backbones.strand import ReverseComplementEquivariant
from seqlab.embedding import TokenEmbedding
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
    n_classes: int = 0  # above 0: a class embedding is added to every token's (class-conditional generation)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strand == "equivariant" and self.direction == "causal":
            raise ValueError(
                "strand: equivariant needs direction: bidirectional (the reverse complement of a causal model reads "
                "the future); use strand: augment with direction: causal"
            )
        if self.vocab_size < 12:
            raise ValueError(f"vocab_size: must be 12 or more, got {self.vocab_size}")
        if self.n_classes < 0:
            raise ValueError(f"n_classes: must be 0 or more, got {self.n_classes}")
        if self.n_classes and self.strand == "equivariant":
            raise ValueError("n_classes: a reverse-complement equivariant model takes no class; use strand: single")


class LanguageModel(nn.Module):
    """ids (b l) -> logits (b l vocab), carrying the backbone's state: forward(ids, state, mask) -> (logits, state).

    With `n_classes` in the config, `classes` (b) says which class each row is of; every call needs it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.class_embedding = TokenEmbedding(config.n_classes, config.d_model) if config.n_classes else None
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)
        self.backbone = build_backbone(config)
        tied = self.embedding if config.tie_embeddings else None
        self.lm_head = LanguageHead(config.d_model, config.vocab_size, tied_to=tied)

    def forward(
        self,
        ids: Tensor,
        state=None,
        mask: Tensor | None = None,
        return_state: bool = True,
        classes: Tensor | None = None,
    ):
        x = self.dropout(self.embed(ids, classes))
        y, state = self.backbone(x, state, mask, return_state=return_state)
        return self.lm_head(y), state

    def embed(self, ids: Tensor, classes: Tensor | None = None) -> Tensor:
        """ids (b l), classes (b) -> (b l d_model)."""
        x = self.embedding(ids.long())
        if self.class_embedding is None:
            if classes is not None:
                raise ValueError("classes: this model is not conditional (n_classes: 0); call it without them")
            return x
        if classes is None:
            raise ValueError(f"classes: this model is conditional; give each row a class of 0 to {self.config.n_classes - 1}")
        return x + self.class_embedding(classes.long())[:, None]


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
