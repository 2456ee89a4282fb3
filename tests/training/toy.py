"""A task of a few microseconds: sequences in which every symbol follows from the one before."""

import math
import time
from dataclasses import dataclass

import torch

from seqlab.heads.language import weighted_cross_entropy
from seqlab.model import ModelConfig, build_model


@dataclass(frozen=True)
class ToyConfig:
    name: str = "toy"


class ToyTask:
    metric = "bits per symbol"
    positionwise = True

    def __init__(
        self,
        train,
        *,
        d_model=8,
        dropout=0.1,
        rows=8,
        micro_rows=None,
        stop_before_step=None,
        wrong_validation=False,
        poison_at_step=None,
        poison="weights",
        pause=0.0,
        uneven=False,
    ):
        self.train, self.rows, self.micro_rows = train, rows, micro_rows or rows
        self.model_config = ModelConfig(d_model=d_model, n_layer=2, d_state=2, dropout=dropout)
        self.stop_before_step, self.wrong_validation = stop_before_step, wrong_validation
        self.poison_at_step, self.poison, self.pause, self.uneven = poison_at_step, poison, pause, uneven

    def build_model(self):
        self.model = build_model(self.model_config)
        return self.model

    def resolved_config(self):
        return ToyConfig()

    def _batch(self, seed, rows, sign=1):
        start = torch.randint(0, 12, (rows, 1), generator=torch.Generator().manual_seed(seed))
        ids = (start + sign * 5 * torch.arange(17)) % 12
        weight = torch.ones(rows, 16)
        if self.uneven:  # ranks and micro-batches then hold different numbers of scored positions
            weight[::3, 4:] = 0
        return {"ids": ids[:, :-1], "target": ids[:, 1:], "weight": weight}

    def train_batches(self, step, rank, world_size):
        if step == self.stop_before_step:
            raise RuntimeError("pulled the plug")
        time.sleep(self.pause)
        batch = self._batch(1000 * (self.train.seed + 1) + step, self.rows)
        share = self.rows // world_size
        mine = {k: v[rank * share : (rank + 1) * share] for k, v in batch.items()}
        mine["step"] = torch.full((share,), step)
        return [{k: v[i : i + self.micro_rows] for k, v in mine.items()} for i in range(0, share, self.micro_rows)]

    def validation_batches(self, rank, world_size):
        yield self._batch(7 + rank, 16, sign=-1 if self.wrong_validation else 1)

    def loss(self, model, batch):
        if self.poison_at_step is not None and "step" in batch and int(batch["step"][0]) == self.poison_at_step:
            with torch.no_grad():
                if self.poison == "weights":
                    model.backbone.layers[1].mixer.in_proj.weight[0, 0] = math.nan
                else:
                    model.embedding.weight[:, 0] = math.inf
        logits, _ = model(batch["ids"], return_state=False)
        return self.piece_loss(logits, batch, 0, logits.shape[1])

    def piece_loss(self, output, batch, start, stop):
        return weighted_cross_entropy(output, batch["target"][:, start:stop], batch["weight"][:, start:stop])

    def weight(self, batch):
        return batch["weight"].sum().item()

    def tokens(self, batch):
        return batch["ids"].numel()

    def metric_value(self, mean_loss):
        return mean_loss / math.log(2)

    def describe(self, batch):
        return f"toy batch of step {int(batch['step'][0])}"
