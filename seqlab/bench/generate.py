"""How fast models generate on this machine, beside mamba_ssm where it is installed: what `seqlab bench generate` runs.

First a parity gate: log-probabilities by the decoder's steps against the parallel forward pass on the same tokens, for
every back end, shape and number type that will be timed. What fails is reported and not timed. Then tokens a second for
several numbers of streams, drawing included, untrained weights of an equal stack everywhere (speed does not depend on
their values); and the time a prompt takes. All shapes take minutes, so every row is told as soon as it is there.

The peer is mamba_ssm's own generation: its language model, bfloat16, CUDA graphs (`cg=True`), drawing at temperature 1. It has no U-Net, so
it is only timed on isotropic stacks. Both sides are timed in the same two ways, once everything is compiled and recorded:

    whole        a call that reads a prompt of one token a stream and makes `tokens` more: what a user waits for
    a further    the difference between that and a call for a thirty-second of the tokens: neither prompt nor call count
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from seqlab.bench import machine
from seqlab.errors import UserError
from seqlab.model import ModelConfig, build_model
from seqlab.ops.decode import Decoder, Sampling, fastest, unavailable
from seqlab.ops.decode.request import Request

SHAPES: dict[str, dict] = {
    "youtubemix_1m": {"architecture": "unet", "d_model": 64, "n_layer": 3, "pool": (16, 16)},
    "sc09_6m": {"architecture": "unet", "d_model": 64, "n_layer": 8, "pool": (4, 4)},
    "8 x 64": {"d_model": 64, "n_layer": 8},
    "8 x 256": {"d_model": 256, "n_layer": 8},
    "16 x 512": {"d_model": 512, "n_layer": 16},
}
"""n_layer x d_model of the isotropic stacks; the U-Nets are those of the Mamba paper's audio models."""
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Largest difference of a log-probability that passes the gate."""
PEER = "mamba_ssm"


@dataclass(frozen=True)
class Settings:
    shapes: tuple[str, ...] = tuple(SHAPES)
    batches: tuple[int, ...] = (1, 64, 512)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    backends: tuple[str, ...] = ("auto",)
    vocab_size: int = 256
    prompt: int = 160_000  # tokens of the prompt that is timed; 0: none
    tokens: int = 2048  # of a whole call
    seconds: float = 0.5  # about how long one timing runs, but two calls at least
    device: str = "cuda"
    seed: int = 0  # of weights and data

    def __post_init__(self) -> None:
        for name in self.shapes:
            if name not in SHAPES:
                raise UserError(f"bench generate: shape {name!r} is not known; allowed: {', '.join(map(repr, SHAPES))}")
        if not self.batches or min(self.batches) < 1:
            raise UserError(f"bench generate: --batch must be 1 or more, got {list(self.batches)}")
        if self.tokens < 2:
            raise UserError(f"bench generate: --tokens must be 2 or more, got {self.tokens}")
        if self.seconds <= 0:
            raise UserError(f"bench generate: --seconds must be above 0, got {self.seconds:g}")


@dataclass(frozen=True)
class Row:
    shape: str
    batch: int
    backend: str
    dtype: str
    per_stream: float  # further tokens a second of one stream
    total: float  # of all streams
    whole: float  # of all streams, by a whole call


@dataclass
class Result:
    settings: dict
    machine: str
    torch: str
    errors: dict[str, float]  # "shape, back end, dtype" -> largest difference of a log-probability
    rows: list[Row] = field(default_factory=list)
    prompt_seconds: dict[str, float] = field(default_factory=dict)  # shape -> seconds
    state_bytes: dict[str, int] = field(default_factory=dict)  # shape -> bytes a stream
    absent: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def make_model(shape: str, settings: Settings) -> torch.nn.Module:
    """An untrained model of a shape, the same every time."""
    torch.manual_seed(settings.seed)
    config = ModelConfig(**SHAPES[shape], vocab_size=settings.vocab_size, tie_embeddings=False)
    return build_model(config).to(settings.device).eval()


@torch.inference_mode()
def error(model, batch: int, backend: str, dtype: torch.dtype, settings: Settings) -> float:
    """Largest difference between log-probabilities by steps and by the parallel forward pass in float32, 64 tokens. Logits
    are made as large as a trained model's, so that the difference means something."""
    ids = torch.randint(0, settings.vocab_size, (batch, 64), generator=torch.Generator().manual_seed(settings.seed)).to(settings.device)
    weight = model.lm_head.weight
    before = weight.clone()
    weight.mul_(10.0)
    try:
        exact = model(ids)[0].log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        decoder = Decoder(model, batch, backend=backend, dtype=dtype)
        decoder.prefill(ids[:, :20])
        return float((decoder.score(ids[:, 20:]) - exact[:, 19:]).abs().max())
    finally:
        weight.copy_(before)


def rates(call: Callable[[int], object], settings: Settings) -> tuple[float, float]:
    """Tokens a second of one stream: further ones, and those of a whole call. call(n) reads a token and makes n more."""
    synchronise = torch.cuda.synchronize if settings.device == "cuda" else (lambda: None)

    def took(n: int) -> float:
        synchronise()
        began = time.perf_counter()
        call(n)
        synchronise()
        return time.perf_counter() - began

    def least(n: int) -> float:
        times: list[float] = []
        while len(times) < 2 or (sum(times) < settings.seconds and len(times) < 20):
            times.append(took(n))
        return min(times)

    short, long = max(settings.tokens // 32, 1), settings.tokens
    call(long)  # compiles, allocates; mamba_ssm makes its graph anew whenever a text is longer than any before
    call(short)
    whole, part = least(long), least(short)
    return (long - short) / (whole - part) if whole > part else long / whole, long / whole


def peer(shape: str, batch: int, settings: Settings) -> tuple[float, float]:
    """The same of mamba_ssm's own generation. Raises whatever keeps it from running."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    sizes = SHAPES[shape]
    config = MambaConfig(d_model=sizes["d_model"], n_layer=sizes["n_layer"], vocab_size=settings.vocab_size)
    torch.manual_seed(settings.seed)
    model = MambaLMHeadModel(config, device=settings.device, dtype=torch.bfloat16).eval()
    ids = torch.full((batch, 1), settings.vocab_size // 2, device=settings.device)
    return rates(lambda n: model.generate(input_ids=ids, max_length=n + 1, cg=True, top_k=0, temperature=1.0), settings)


def run(
    settings: Settings, progress: Callable[[str], None] = lambda text: None, say: Callable[[str], None] = lambda text: None
) -> Result:
    """Gate, then time everything. `progress` is told what is being done, `say` what has been found. Raises UserError if nothing of
    ours passes the gate."""
    shown = dataclasses.asdict(settings) | {"dtypes": [_name(dtype) for dtype in settings.dtypes]}
    result = Result(shown, machine(settings.device), torch.__version__, {})
    for shape in settings.shapes:
        model = make_model(shape, settings)
        for batch in settings.batches:
            for dtype in settings.dtypes:
                for backend in _backends(model, batch, dtype, settings):
                    progress(key := f"{shape}, {batch} streams, {backend}, {_name(dtype)}")
                    why = unavailable(Request(model, batch, _device(model), dtype)).get(backend)
                    if why is not None:
                        result.absent[key] = why
                        continue
                    result.errors[key] = error(model, batch, backend, dtype, settings)
                    if not result.errors[key] <= LIMITS[dtype]:
                        result.absent[key] = f"not timed: log-probabilities differ by {result.errors[key]:.2g}"
                        continue
                    decoder = Decoder(model, batch, backend=backend, dtype=dtype)
                    result.rows.append(row := _row(shape, batch, backend, _name(dtype), _rates(decoder, settings)))
                    say(f"{_told(row)}, parity {result.errors[key]:.1e}")
                    result.state_bytes[shape] = decoder.state_bytes_per_stream
            _peer_row(shape, batch, settings, result, progress, say)
        if settings.prompt:
            progress(f"{shape}, prompt of {settings.prompt:,}")
            result.prompt_seconds[shape] = _prompt_seconds(model, settings)
            say(f"{shape}, prompt of {settings.prompt:,}: {result.prompt_seconds[shape]:.3f} s")
    if not result.rows:
        raise UserError("bench generate: nothing was timed: " + "; ".join(f"{k}: {v}" for k, v in result.absent.items()))
    return result


def _told(row: Row) -> str:
    rates = f"{row.per_stream:,.0f} further tokens/s of a stream, {row.total:,.0f} in total, {row.whole:,.0f} by whole calls"
    return f"{row.shape}, {row.batch:,} streams, {row.backend}, {row.dtype}: {rates}"


def _row(shape: str, batch: int, backend: str, dtype: str, timed: tuple[float, float]) -> Row:
    further, whole = timed
    return Row(shape, batch, backend, dtype, further, further * batch, whole * batch)


def _rates(decoder: Decoder, settings: Settings) -> tuple[float, float]:
    prompt = torch.tensor([settings.vocab_size // 2])

    def call(n: int) -> None:
        decoder.prefill(prompt)
        decoder.generate(n, Sampling())

    return rates(call, settings)


def _backends(model, batch: int, dtype: torch.dtype, settings: Settings) -> list[str]:
    """The back ends to time; "auto" stands for the one that it would take."""
    first = fastest(Request(model, batch, _device(model), dtype))
    return list(dict.fromkeys(first if name == "auto" else name for name in settings.backends))


def _peer_row(
    shape: str, batch: int, settings: Settings, result: Result, progress: Callable[[str], None], say: Callable[[str], None]
) -> None:
    if PEER in result.absent or SHAPES[shape].get("architecture") == "unet":
        return
    if settings.device != "cuda":
        result.absent[PEER] = "needs an NVIDIA GPU"
        return
    progress(f"{shape}, {batch} streams, {PEER}")
    try:
        timed = peer(shape, batch, settings)
    except Exception as e:  # a peer may fail in any way; that is its row
        result.absent[PEER] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        return
    result.rows.append(row := _row(shape, batch, PEER, "bf16", timed))
    say(_told(row))


def _prompt_seconds(model, settings: Settings) -> float:
    ids = torch.randint(0, settings.vocab_size, (1, settings.prompt), generator=torch.Generator().manual_seed(settings.seed))
    times = []
    for _ in range(2):  # the first compiles
        decoder = Decoder(model, 1)
        if settings.device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        decoder.prefill(ids)
        if settings.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[-1]


def _device(model) -> torch.device:
    return model.embedding.weight.device


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one a shape, number of streams, back end and number type; columns about the peer if it was timed."""
    peers = {(row.shape, row.batch): row for row in result.rows if row.backend == PEER}
    rows = []
    for row in result.rows:
        theirs = peers.get((row.shape, row.batch))
        times = [[""], [""]] if peers else [[], []]
        if theirs and row.backend != PEER:
            times = [[f"{row.total / theirs.total:.2f}"], [f"{row.whole / theirs.whole:.2f}"]]
        numbers = [f"{row.per_stream:,.0f}", f"{row.total:,.0f}", *times[0], f"{row.whole:,.0f}", *times[1]]
        rows.append([row.shape, f"{row.batch:,}", row.backend, row.dtype, *numbers])
    whole, times = f"calls of {result.settings['tokens']:,}", [f"x {PEER}"] if peers else []
    return ["shape", "streams", "back end", "weights", "further tokens/s", "in total", *times, whole, *times], rows


def facts(result: Result) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what a shape's prompt and state cost."""
    prompt = result.settings["prompt"]
    header = ["shape", "state a stream", *([f"prompt of {prompt:,}"] if prompt else [])]
    rows = []
    for shape, size in result.state_bytes.items():
        seconds = [f"{result.prompt_seconds[shape]:.3f} s"] if shape in result.prompt_seconds else []
        rows.append([shape, f"{size / 1024:,.0f} KiB", *seconds])
    return header, rows
