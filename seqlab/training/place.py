"""Where a process stands when several train one model: which rows of a step's data are its own, and which piece of them."""

from dataclasses import dataclass

from seqlab.errors import UserError
from seqlab.training.task import Batch


@dataclass(frozen=True)
class Place:
    """A rank in the mesh (data, context): neighbours share sequences, so that they share a host if they can.

    The `context` ranks of one data rank are given the same rows, and each works on its piece of every sequence.
    """

    rank: int
    world_size: int
    context: int = 1

    @property
    def data_rank(self) -> int:
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        return self.world_size // self.context

    def piece(self, batch: Batch) -> Batch:
        """Tensors (b l ...) cut along l, as evenly as it goes; what belongs to whole rows (b) is everybody's."""
        if self.context == 1:
            return batch
        rank = self.rank % self.context
        shortest = min((x.shape[1] for x in batch.values() if x.dim() > 1), default=self.context)
        if shortest < self.context:
            raise UserError(
                f"--context-parallel {self.context}: a sequence of {shortest} positions cannot be shared by {self.context} "
                "devices; use fewer for each sequence"
            )
        return {
            key: x.tensor_split(self.context, dim=1)[rank].contiguous() if x.dim() > 1 else x for key, x in batch.items()
        }
