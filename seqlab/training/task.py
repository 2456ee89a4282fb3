"""What the trainer needs to know of a task; each file in `tasks/` implements it."""

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn

Batch = dict[str, Tensor]


class Task(Protocol):
    """A thing a model can be trained for.

    Batches are dictionaries of tensors on the CPU. They are pure functions of the step (and of the run's seed), so a
    resumed run sees what an uninterrupted one would have seen.
    """

    #: name and unit of the number that validation reports and early stopping minimises, for example "bits per base"
    metric: str

    #: whether a batch may be cut along dimension 1 of its tensors (b l ...), the losses of the pieces adding up to that
    #: of the whole, so that several ranks may share a sequence; a task that leaves this out cannot
    positionwise: bool

    def build_model(self) -> nn.Module: ...

    def train_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """The micro-batches of one optimiser step on one rank."""

    def validation_batches(self, rank: int, world_size: int) -> Iterable[Batch]: ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weighted sum of losses in nats and the sum of weights, both (); apart, so that means over ranks are exact."""

    def weight(self, batch: Batch) -> float:
        """The sum of weights that `loss` will return for this batch."""

    def metric_value(self, mean_loss: float) -> float:
        """Validation loss (nats) in the unit of `metric`."""

    def tokens(self, batch: Batch) -> int:
        """Tokens read, for the rate in the progress bar."""

    def describe(self, batch: Batch) -> str:
        """Where the batch comes from, for the message about a loss that is not a number."""

    def resolved_config(self) -> Any: ...

    # Optional, for memory modes that work on a piece of the sequence at a time (seqlab/training/memory.py), and so for
    # sequences of any length. One convention: batch["ids"] is (b l ...) and every tensor of a batch has its rows in
    # dimension 0.
    #
    # A loss that is a sum over positions (see tasks/language_modeling.py). The model is fed batch["ids"] and, if there is
    # one, batch["mask"] (b l), and nothing else; `loss(model, batch)` is `piece_loss(model(batch["ids"])[0], batch, 0, l)`.
    #
    #     def piece_loss(self, output: Tensor, batch: Batch, start: int, stop: int) -> tuple[Tensor, Tensor]:
    #         """What `loss` sums over positions start .. stop, whose output (b stop-start ...) the model gave."""
    #
    # Anything else that a causal model computes from left to right, such as a class from features pooled on the way: the
    # state is any nest of tensors, and holds all that later pieces need. The losses of the pieces add up to `loss`; a
    # piece without one returns zeros, ().
    #
    #     def piece(self, model, batch, start: int, stop: int, state: Any, more: bool) -> tuple[Tensor, Tensor, Any]:
    #         """Loss, weight and the state after positions start .. stop; `state` is None at the start of the sequence,
    #         `more` False at its last piece."""
    #
    # `longest_row`, an int: positions of the longest row of any batch, where the last step's batch need not have it; what
    # the planner makes room for.
