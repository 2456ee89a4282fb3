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
from seqlab.heads.sample import PredictionHead, SampleState


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
    n_classes: int = 0  # above 0: class-conditional generation
    # above 0: the logits follow a linear prediction from so many samples before (heads/sample.py); for sampled signals
    prediction_order: int = 0
    prediction_memory: float = 0.995  # weight of products a sample ago in the fit: 0.998 remembers 500 samples

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
        if self.n_classes and self.direction != "causal":
            raise ValueError("n_classes: classes are for generation; use direction: causal")
        if self.prediction_order < 0:
            raise ValueError(f"prediction_order: must be 0 or more, got {self.prediction_order}")
        if self.prediction_order and self.direction != "causal":
            raise ValueError("prediction_order: only a causal model predicts the next sample; use direction: causal")
        if not 0.9025 < self.prediction_memory < 1:  # the window's onset remembers 0.95^2
            raise ValueError(f"prediction_memory: must lie between 0.9025 and 1, got {self.prediction_memory}")


class LanguageModel(nn.Module):
    """ids (b l) -> logits (b l vocab), carrying the backbone's state: forward(ids, state, mask) -> (logits, state).

    With `n_classes` in the config, `classes` (b) says which class each row is of; every call needs it. A class is a vector
    added to every token's embedding, and one more added before every block, which start as zero.
    """

    may_be_absent = ("class_shifts",)  # from checkpoints of the time when only the embedding was told the class

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.class_embedding = TokenEmbedding(config.n_classes, config.d_model) if config.n_classes else None
        self.backbone = build_backbone(config)
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)
            self.class_shifts = nn.ModuleList(TokenEmbedding(config.n_classes, width) for width in self.backbone.widths)
            for shift in self.class_shifts:
                nn.init.zeros_(shift.weight)
        tied = self.embedding if config.tie_embeddings else None
        self.lm_head = LanguageHead(config.d_model, config.vocab_size, tied_to=tied)
        self.register_load_state_dict_post_hook(LanguageModel._tie)  # load_state_dict(assign=True)
        order = config.prediction_order
        self.prediction_head = PredictionHead(config.d_model, config.vocab_size, order, config.prediction_memory) if order else None

    def _apply(self, fn, recurse=True):
        """What `to`, `to_empty` and the like go through; from the meta device it makes a new parameter for each module."""
        super()._apply(fn, recurse)
        self._tie()
        return self

    def _tie(self, *_) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def forward(
        self,
        ids: Tensor,
        state=None,
        mask: Tensor | None = None,
        return_state: bool = True,
        classes: Tensor | None = None,
    ):
        y, after, prediction = self.read(ids, state, mask, return_state, classes)
        return self.logits(y, prediction), after

    def read(
        self,
        ids: Tensor,
        state=None,
        mask: Tensor | None = None,
        return_state: bool = True,
        classes: Tensor | None = None,
    ):
        """All but the heads: features (b l d_model), the state, and the linear prediction if there is one."""
        x, shifts, prediction = self.embedding(ids), None, None
        if classes is not None:
            if self.class_embedding is None:
                raise ValueError("classes: this model is not conditional (n_classes: 0); call it without them")
            x = x + self.class_embedding(classes)[:, None]
            shifts = [shift(classes)[:, None] for shift in self.class_shifts]
        elif self.class_embedding is not None:
            raise ValueError(f"classes: this model is conditional; give each row a class of 0 to {self.config.n_classes - 1}")
        before = state
        if self.prediction_head is not None:
            if mask is not None:
                raise ValueError("mask: a model with a prediction_order reads every sample; call it without a mask")
            before, heard = (None, None) if state is None else state
            prediction, heard = self.prediction_head.predictor(ids, heard)
            told = self.prediction_head.input
            x = x + (prediction.inputs.to(told.dtype) @ told).to(x.dtype)
        options = {} if shifts is None else {"shifts": shifts}
        y, after = self.backbone(self.dropout(x), before, mask, return_state=return_state, **options)
        if return_state and prediction is not None:
            after = SampleState(after, heard)
        return y, after, prediction

    def logits(self, y: Tensor, prediction=None) -> Tensor:
        """Of what `read` gave."""
        logits = self.lm_head(y)
        return logits if prediction is None else logits + self.prediction_head(y, prediction)


def build_model(config: ModelConfig, complement: Tensor | None = None) -> nn.Module:
    """The language model of a config; `complement` (vocab) is the tokenizer's, needed for strand: equivariant."""
    model = LanguageModel(config)
    if config.strand != "equivariant":
        return model
    if complement is None:
        raise ValueError("strand: equivariant needs the tokenizer's complement table")
    identity = torch.arange(config.vocab_size, device=complement.device)
    identity[: len(complement)] = complement[: config.vocab_size]
    return ReverseComplementEquivariant(model, identity)


def language_model(model: nn.Module) -> LanguageModel:
    """The LanguageModel inside whatever `build_model` returned."""
    return model.model if isinstance(model, ReverseComplementEquivariant) else model
