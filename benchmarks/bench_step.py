"""One whole training step (forward, backward, AdamW) of a small causal model on this machine's CPU, against transformers.

Two paths of transformers' MambaForCausalLM: its default, a loop over time, whose backward is quadratic in the length (a
step is given up after --limit seconds), and `use_mambapy`, the parallel scan of mambapy.

Parity gate first: the same weights, the same batch, loss and every gradient must agree (at 128 tokens, where the loop is
bearable). Then the median of several steps of each, a table, and one JSON line.

    python benchmarks/bench_step.py                 2 layers, d_model 256, 1 x 2048 tokens
"""

import argparse
import json
import multiprocessing
import statistics
import time

import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM

from seqlab.model import ModelConfig, build_model


def build_pair(d_model: int, n_layer: int, use_mambapy: bool = False):
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
            use_mambapy=use_mambapy,
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
    return statistics.median(times[1:] or times)  # the first compiles


def their_step(d_model: int, n_layer: int, length: int, use_mambapy: bool, repeats: int, queue) -> None:
    _, model = build_pair(d_model, n_layer, use_mambapy)
    model.train()
    queue.put(time_steps(model, losses(torch.randint(7, 11, (1, length)))[1], repeats))


def within(limit: float, *arguments) -> float | None:
    """Seconds of their step, measured in a process of its own; None if it took longer than `limit` in all."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=their_step, args=(*arguments, queue))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        return None
    return queue.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--n-layer", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=240, help="seconds for each path of transformers")
    options = parser.parse_args()
    ids = torch.randint(7, 11, (1, 128))
    worst = max(parity(build_pair(options.d_model, options.n_layer, use), losses(ids)) for use in (False, True))
    print(f"parity: largest relative difference of loss and gradients {worst:.1e}")
    model, _ = build_pair(options.d_model, options.n_layer)
    ours = time_steps(model, losses(torch.randint(7, 11, (1, options.length)))[0], options.repeats)
    shape = f"{options.n_layer} layers, d_model {options.d_model}, 1 x {options.length}"
    print(f"training step, {shape}, float32, {torch.get_num_threads()} threads")
    print(f"  seqlab                      {1e3 * ours:9.1f} ms   {options.length / ours:10,.0f} tokens/s")
    result = {"benchmark": "step", "shape": [options.n_layer, options.d_model, 1, options.length], "seqlab_s": ours}
    for name, use_mambapy, repeats in (("transformers, mambapy", True, 2), ("transformers, loop", False, 0)):
        theirs = within(options.limit, options.d_model, options.n_layer, options.length, use_mambapy, repeats)
        result[name] = theirs
        if theirs is None:
            print(f"  {name:<25}   more than {options.limit:.0f} s   more than {options.limit / ours:.0f}x")
        else:
            rate = options.length / theirs
            print(f"  {name:<25} {1e3 * theirs:11.1f} ms   {rate:10,.0f} tokens/s   {theirs / ours:.1f}x")
    print(json.dumps({**result, "parity": worst}))


if __name__ == "__main__":
    main()
