"""Compare a back end of the decoder with the parallel forward pass on this machine, quickly: what `seqlab doctor` shows."""

import torch

from seqlab.model import ModelConfig, build_model
from seqlab.ops.decode import BACKENDS, Decoder


@torch.inference_mode()
def self_check(backend: str) -> float:
    """Largest error of a log-probability, relative to the largest one: a small U-Net (an isotropic stack for
    back ends that run nothing else), two streams, a prompt and 20 steps, in float32 (bfloat16 for what runs nothing else).

    About 1e-6 is right, in bfloat16 about 1e-3. Raises RuntimeError where the back end cannot run here; the message is its reason.
    """
    if (reason := BACKENDS[backend].unavailable()) is not None:
        raise RuntimeError(f"decode: back end {backend!r} is not available: {reason}")
    device = "cuda" if backend in ("persistent", "batched", "clustered", "solo", "graph") else "cpu"
    stack = {"d_model": 64, "n_layer": 2}
    shape = stack if backend in ("batched", "clustered", "solo") else {"architecture": "unet", "d_model": 16, "n_layer": 1, "pool": (2, 2)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(ModelConfig(**shape, vocab_size=32)).to(device).eval()
    model.embedding.weight.mul_(30.0)
    ids = torch.randint(0, 32, (2, 31), generator=torch.Generator().manual_seed(0)).to(device)
    exact = model(ids)[0].log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    decoder = Decoder(model, 2, backend=backend, dtype=torch.bfloat16 if backend == "clustered" else torch.float32)
    decoder.prefill(ids[:, :11])
    error = (decoder.score(ids[:, 11:]) - exact[:, 10:]).abs().max() / exact.abs().max()
    return float(error) if error == error else float("inf")
