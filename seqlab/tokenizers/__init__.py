"""Text or sound <-> token ids, one byte a token."""

from seqlab.tokenizers import nucleotide, waveform

__all__ = ["nucleotide", "waveform"]
