"""What `seqlab bench` measures: this machine's numbers, parity first, beside whatever peers are installed."""

import torch


def machine(device: str) -> str:
    """What is measured on, "cpu" or "cuda", for people."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
