"""Can generated digits be recognised? A small network learns the recordings of a dataset's training split, is tested on the
test split, and then listens to a folder that `seqlab generate audio --class ...` wrote.

    python benchmarks/recognise_digits.py --data data/digits --samples digits/ [--run runs/digits] [--epochs 60] [--seed 0]

The listener is a convolutional network on log-mel spectrograms (40 bands, 10 ms steps, one second); it never hears generated
sound in training. Prints accuracy on the test split, on the samples, a confusion matrix, and one line of JSON. With --run, the
model that made the samples is a second listener, on the test split: it hears the class that makes a recording likeliest.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seqlab.audio import read_mono  # noqa: E402
from seqlab.dataset import TokenStore  # noqa: E402
from seqlab.tokenizers.waveform import QUANTIZERS  # noqa: E402
from tasks import audio, runs  # noqa: E402

BANDS, SECONDS = 40, 1.0


def mel_filters(rate: int, size: int) -> torch.Tensor:
    """(BANDS, size // 2 + 1) triangles, evenly spaced in mel (O'Shaughnessy 1987) from 60 Hz to the Nyquist frequency."""
    to_mel, to_hz = (lambda f: 2595 * np.log10(1 + f / 700)), (lambda m: 700 * (10 ** (m / 2595) - 1))
    edges = to_hz(np.linspace(to_mel(60), to_mel(rate / 2), BANDS + 2))
    f = np.linspace(0, rate / 2, size // 2 + 1)
    up = (f - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - f) / (edges[2:] - edges[1:-1])[:, None]
    return torch.tensor(np.maximum(0, np.minimum(up, down)), dtype=torch.float32)


def features(waves: list[np.ndarray], rate: int) -> torch.Tensor:
    """(b 1 BANDS frames): log-mel spectrograms of one second, shorter sounds followed by silence."""
    length, size, hop = round(SECONDS * rate), round(0.032 * rate), round(0.01 * rate)
    batch = torch.zeros(len(waves), length)
    for row, wave in zip(batch, waves):
        part = torch.from_numpy(np.ascontiguousarray(wave[:length], dtype=np.float32))
        row[: len(part)] = part
    window = torch.hann_window(size)
    power = torch.stft(batch, size, hop, window=window, return_complex=True, pad_mode="constant").abs() ** 2
    mel = mel_filters(rate, size) @ power
    return ((mel + 1e-4).log() / 4)[:, None]


class Listener(nn.Module):
    def __init__(self, classes: int, width: int = 32):
        super().__init__()
        layers: list[nn.Module] = []
        sizes = [1, width, 2 * width, 4 * width]
        for before, after in zip(sizes, sizes[1:]):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Dropout(0.4))
        self.head = nn.Linear(sizes[-1] * 6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def recordings(store: TokenStore, split: str) -> tuple[list[np.ndarray], torch.Tensor]:
    """Amplitudes of every recording of a split, and its class."""
    levels, labels = QUANTIZERS[store.manifest["tokenizer"]], store.manifest["labels"]
    waves, classes = [], []
    for index, start, end in store.manifest["splits"][split]:
        at = store.offsets[index]
        waves.append(levels.decode(store.tokens[at + start : at + end]) / store.manifest["scale"])
        classes.append(labels.index(store.manifest["sequences"][index]["label"]))
    return waves, torch.tensor(classes)


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, rng: np.random.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    batch = 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * -(-len(x) // batch))
    model.train()
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(len(x)))
        for rows in order.split(batch):
            part = x[rows].clone()
            # louder or softer (an offset of the logarithm), a little earlier or later, a band or a moment missing
            part += torch.from_numpy(rng.uniform(-0.25, 0.25, (len(rows), 1, 1, 1))).float().to(x.device)
            part = torch.roll(part, int(rng.integers(-8, 9)), dims=3)
            band, moment = int(rng.integers(0, BANDS - 5)), int(rng.integers(0, part.shape[3] - 10))
            part[:, :, band : band + 5] = part.mean()
            part[:, :, :, moment : moment + 10] = part.mean()
            loss = F.cross_entropy(model(part), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def answers(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part).argmax(1) for part in x.split(256)]).cpu()


@torch.inference_mode()
def likeliest(run, store: TokenStore, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every test recording: its class, and the class under which the run's model finds it likeliest."""
    spans = audio.spans_of(store, "test", int(store.lengths.max()))
    ids, target, weight = (torch.from_numpy(a).to(device) for a in audio.read_windows(store, spans, QUANTIZERS[run.config.sound.quantizer].zero))
    model, labels = run.model.to(device).eval(), run.config.sound.labels
    scores = torch.zeros(len(labels), len(ids))
    for label in range(len(labels)):
        for rows in torch.arange(len(ids), device=device).split(16):
            logits, _ = model(ids[rows], return_state=False, classes=torch.full_like(rows, label))
            log_p = logits.log_softmax(-1).gather(-1, target[rows].long()[..., None])[..., 0]
            scores[label, rows.cpu()] = (log_p * weight[rows]).sum(1).cpu()
    return torch.from_numpy(audio.class_indices(store, labels)[audio.sequence_of(store, spans)]), scores.argmax(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset with labels, from `seqlab prep audio`")
    parser.add_argument("--samples", type=Path, nargs="*", default=[], help="folders from `seqlab generate audio --class ...`")
    parser.add_argument("--run", type=Path, help="the run that made the samples: can it tell the recordings apart?")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    store = TokenStore.open(options.data)
    rate, labels = store.manifest["sample_rate"], store.manifest["labels"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.monotonic()
    train_waves, y = recordings(store, "train")
    model = Listener(len(labels)).to(device)
    train(model, features(train_waves, rate).to(device), y.to(device), options.epochs, rng)
    test_waves, test_y = recordings(store, "test")
    right = answers(model, features(test_waves, rate).to(device)) == test_y
    print(f"listener: {len(y)} recordings, {options.epochs} epochs, {time.monotonic() - began:.0f} s on the {device}")
    print(f"test split: {int(right.sum())} of {len(right)} recordings recognised ({right.float().mean():.1%})")
    result = {"test_accuracy": right.float().mean().item(), "test_recordings": len(right), "samples": []}
    if options.run is not None:
        wanted, heard = likeliest(runs.load_run(options.run, task=audio.NAME), store, device)
        n = int((wanted == heard).sum())
        print(f"{options.run}: {n} of {len(wanted)} test recordings are likeliest under their own class ({n / len(wanted):.1%})")
        result["likeliest"] = n
    for folder in options.samples:
        rows = json.loads((folder / "generation.json").read_text())["samples"]
        waves = [np.concatenate(list(read_mono(folder / row["file"], rate))) for row in rows]
        wanted = torch.tensor([labels.index(row["class"]) for row in rows])
        heard = answers(model, features(waves, rate).to(device))
        n = int((heard == wanted).sum())
        print(f"{folder}: {n} of {len(rows)} recognised as the class they were made for ({n / len(rows):.1%}; chance {1 / len(labels):.1%})")
        table = torch.zeros(len(labels), len(labels), dtype=torch.int64)
        for a, b in zip(wanted.tolist(), heard.tolist()):
            table[a, b] += 1
        print("  made \\ heard  " + " ".join(f"{label:>4}" for label in labels))
        for label, row in zip(labels, table.tolist()):
            print(f"  {label:>12}  " + " ".join(f"{count or '.':>4}" for count in row))
        result["samples"].append({"folder": str(folder), "recognised": n, "of": len(rows), "confusion": table.tolist()})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
