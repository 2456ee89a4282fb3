"""One whole training step (forward, backward, AdamW) of a small causal model on this machine's CPU, against transformers.

Parity gate first: the same weights, the same batch, logits and every gradient of both must agree. Then the median of
several steps of each, a table, and one JSON line.

    python benchmarks/bench_step.py                 2 layers, d_model 256, 1 x 2048 tokens
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM

from seqlab.model import ModelConfig, build_model


def build_pair(d_model: int, n_layer: int):
    torch.manual_seed(0)
    ours = build_model(ModelConfig(d_model=d_model, n_layer=n_layer))
    config = ours.config
    theirs = MambaForCausalLM(
        MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=d_model,
            state_size=config.d_state,
            num_hidden_layers=n_layer,
            conv_kernel=config.d_conv,
            expand=config.expand,
            time_step_rank=config.rank,
            layer_norm_epsilon=config.norm_epsilon,
            use_cache=False,
        )
    )
    weights = ours.state_dict()
    weights["backbone.embeddings.weight"] = weights.pop("embedding.weight")
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return ours, theirs


def losses(ids: torch.Tensor):
    def ours(model):
        logits, _ = model(ids, return_state=False)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def theirs(model):
        logits = model(ids).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())

    return ours, theirs


def parity(models, functions) -> float:
    """Largest relative difference of any parameter's gradient (and of the loss). Raises AssertionError above 1e-3."""
    values = [f(m) for m, f in zip(models, functions)]
    for value in values:
        value.backward()
    worst = abs(values[0].item() - values[1].item()) / values[1].item()
    named = dict(models[1].named_parameters())
    for name, p in models[0].named_parameters():
        other = named[name.replace("embedding.weight", "backbone.embeddings.weight")].grad
        worst = max(worst, ((p.grad - other).norm() / other.norm()).item())
    assert worst < 1e-3, f"gradients differ by {worst:.1e}: no timing of a wrong answer"
    return worst


def time_steps(model, loss, repeats: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first compiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--n-layer", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    models = build_pair(options.d_model, options.n_layer)
    ids = torch.randint(7, 11, (1, options.length))
    functions = losses(ids)
    worst = parity(models, functions)
    print(f"parity: largest relative difference of loss and gradients {worst:.1e}")
    ours = time_steps(models[0], functions[0], options.repeats)
    theirs = time_steps(models[1], functions[1], max(2, options.repeats // 3))
    shape = f"{options.n_layer} layers, d_model {options.d_model}, 1 x {options.length}"
    print(f"training step, {shape}, float32, {torch.get_num_threads()} threads")
    print(f"  seqlab        {1e3 * ours:9.1f} ms   {options.length / ours:10,.0f} tokens/s")
    print(f"  transformers  {1e3 * theirs:9.1f} ms   {options.length / theirs:10,.0f} tokens/s   {theirs / ours:.1f}x")
    print(
        json.dumps(
            {
                "benchmark": "step",
                "shape": [options.n_layer, options.d_model, 1, options.length],
                "seqlab_s": ours,
                "transformers_s": theirs,
                "ratio": theirs / ours,
                "parity": worst,
            }
        )
    )


if __name__ == "__main__":
    main()
