"""Published figures of the benchmarks that `seqlab prep benchmark` reads, to be printed beside ours and marked as such.

Sources:
    C   Schiff et al. 2024, "Caduceus", arXiv 2403.03234: table 1 (GenomicBenchmarks, top-1 accuracy, five seeds, the spread
        is max - min over seeds) and table 2 (Nucleotide Transformer tasks, ten seeds)
    H   Nguyen et al. 2023, "HyenaDNA", arXiv 2306.15794: table 4.5 (five mammals, top-1 accuracy)
    M   Gu & Dao 2023, "Mamba", arXiv 2312.00752: table 13 (great apes, accuracy)

HyenaDNA's own GenomicBenchmarks table is left out: it was tuned on the test split. The tasks' revised files (2024) have
other sequences than those of table 2, so no figure is shown for them.
"""

from collections.abc import Sequence
from typing import NamedTuple

SOURCES = {
    "C": "Caduceus, arXiv 2403.03234",
    "H": "HyenaDNA, arXiv 2306.15794, table 4.5",
    "M": "Mamba, arXiv 2312.00752, table 13",
}


class Figure(NamedTuple):
    """One published number: a model, its score as a share, the spread over seeds (max - min) if it was given, the source."""

    model: str
    score: float
    spread: float | None
    source: str


GENOMIC_MODELS = ("CNN 264K", "HyenaDNA 436K", "Mamba next token 468K", "Caduceus without equivariance 470K", "Caduceus-Ph 470K", "Caduceus-PS 470K")
GENOMIC_BENCHMARKS = {
    "dummy_mouse_enhancers_ensembl": ((0.715, 0.087), (0.780, 0.025), (0.743, 0.054), (0.770, 0.058), (0.754, 0.074), (0.793, 0.058)),
    "demo_coding_vs_intergenomic_seqs": ((0.892, 0.008), (0.904, 0.005), (0.904, 0.004), (0.908, 0.003), (0.915, 0.003), (0.910, 0.003)),
    "demo_human_or_worm": ((0.942, 0.002), (0.964, 0.002), (0.967, 0.002), (0.970, 0.003), (0.973, 0.001), (0.968, 0.002)),
    "human_enhancers_cohn": ((0.702, 0.021), (0.729, 0.014), (0.732, 0.029), (0.741, 0.008), (0.747, 0.004), (0.745, 0.007)),
    "human_enhancers_ensembl": ((0.744, 0.122), (0.849, 0.006), (0.862, 0.008), (0.883, 0.002), (0.893, 0.008), (0.900, 0.006)),
    "human_ensembl_regulatory": ((0.872, 0.005), (0.869, 0.012), (0.814, 0.211), (0.871, 0.007), (0.872, 0.011), (0.873, 0.007)),
    "human_ocr_ensembl": ((0.698, 0.013), (0.783, 0.007), (0.815, 0.002), (0.818, 0.003), (0.828, 0.006), (0.818, 0.006)),
    "human_nontata_promoters": ((0.861, 0.009), (0.944, 0.002), (0.933, 0.007), (0.933, 0.006), (0.946, 0.007), (0.945, 0.010)),
}  # fmt: skip
"""Data set -> (accuracy, max - min) for each of GENOMIC_MODELS."""

GENOMIC_MAX_LENGTH = {"dummy_mouse_enhancers_ensembl": 1024, "human_enhancers_ensembl": 512, "human_ensembl_regulatory": 512, "human_ocr_ensembl": 512}
"""Bases that the published runs cut sequences to."""

NT_MODELS = ("Enformer", "DNABERT-2", "NT-v2-500M", "HyenaDNA 1.6M", "Caduceus-Ph 1.9M", "Caduceus-PS 1.9M")
NT_TASKS = {
    "H3": ("mcc", 0.719, 0.785, 0.784, 0.779, 0.815, 0.799),
    "H3K14ac": ("mcc", 0.288, 0.516, 0.551, 0.612, 0.631, 0.541),
    "H3K36me3": ("mcc", 0.344, 0.591, 0.625, 0.613, 0.601, 0.609),
    "H3K4me1": ("mcc", 0.291, 0.511, 0.550, 0.512, 0.523, 0.488),
    "H3K4me2": ("mcc", 0.211, 0.336, 0.319, 0.455, 0.487, 0.388),
    "H3K4me3": ("mcc", 0.158, 0.352, 0.410, 0.549, 0.544, 0.440),
    "H3K79me3": ("mcc", 0.496, 0.613, 0.626, 0.672, 0.697, 0.676),
    "H3K9ac": ("mcc", 0.420, 0.542, 0.562, 0.581, 0.622, 0.604),
    "H4": ("mcc", 0.732, 0.796, 0.799, 0.763, 0.811, 0.789),
    "H4ac": ("mcc", 0.273, 0.463, 0.495, 0.564, 0.621, 0.525),
    "enhancers": ("mcc", 0.451, 0.516, 0.548, 0.517, 0.546, 0.491),
    "enhancers_types": ("mcc", 0.309, 0.423, 0.424, 0.386, 0.439, 0.416),
    "promoter_all": ("f1", 0.954, 0.971, 0.976, 0.960, 0.970, 0.967),
    "promoter_no_tata": ("f1", 0.955, 0.972, 0.976, 0.959, 0.969, 0.968),
    "promoter_tata": ("f1", 0.960, 0.955, 0.966, 0.944, 0.953, 0.957),
    "splice_sites_all": ("accuracy", 0.848, 0.939, 0.983, 0.956, 0.940, 0.927),
    "splice_sites_acceptors": ("f1", 0.914, 0.975, 0.981, 0.958, 0.937, 0.936),
    "splice_sites_donors": ("f1", 0.906, 0.963, 0.985, 0.949, 0.948, 0.874),
}  # fmt: skip
"""Task -> metric and one score for each of NT_MODELS."""

GREAT_APES = {
    "HyenaDNA 1.4M": {1 << 10: 0.2804, 1 << 12: 0.2843, 1 << 14: 0.4117, 1 << 16: 0.4222, 1 << 18: 0.3110, 1 << 20: 0.5487},
    "Mamba 1.4M": {1 << 10: 0.3147, 1 << 12: 0.2750, 1 << 14: 0.2766, 1 << 16: 0.4072, 1 << 18: 0.4241, 1 << 20: 0.7167},
    "Mamba 7M": {1 << 10: 0.3000, 1 << 12: 0.2901, 1 << 14: 0.3148, 1 << 16: 0.4373, 1 << 18: 0.5660, 1 << 20: 0.8131},
}  # fmt: skip
"""Model -> accuracy by length in bases; chance 0.2 (human, chimpanzee, gorilla, orangutan, bonobo). Source M."""

FIVE_MAMMALS = {
    "Transformer": {1_000: 0.554, 32_000: 0.889},
    "HyenaDNA": {1_000: 0.611, 32_000: 0.934, 250_000: 0.979, 450_000: 0.994, 1_000_000: 0.995},
}
"""Model -> accuracy by length in bases, lengths as the paper writes them (human, lemur, mouse, pig, hippopotamus). Source H."""

GREAT_APE_NAMES = ("bonobo", "chimpanzee", "gorilla", "human", "orangutan")
FIVE_MAMMAL_NAMES = ("hippo", "human", "lemur", "mouse", "pig")
SPECIES_SETS = {"great-apes": (GREAT_APE_NAMES, GREAT_APES, "M"), "five-mammals": (FIVE_MAMMAL_NAMES, FIVE_MAMMALS, "H")}


def figures(suite: str, task: str) -> tuple[str, list[Figure]]:
    """(metric, published figures) of a benchmark's task; none for one that nobody published."""
    if suite == "genomic-benchmarks" and task in GENOMIC_BENCHMARKS:
        rows = zip(GENOMIC_MODELS, GENOMIC_BENCHMARKS[task])
        return "accuracy", [Figure(model, score, spread, "C") for model, (score, spread) in rows]
    if suite == "nucleotide-transformer" and task in NT_TASKS:
        metric, *scores = NT_TASKS[task]
        return metric, [Figure(model, score, None, "C") for model, score in zip(NT_MODELS, scores)]
    return nt_metric(task) if suite.startswith("nucleotide-transformer") else "accuracy", []


def nt_metric(task: str) -> str:
    """The metric that a Nucleotide Transformer task is judged by."""
    if task.startswith("promoter") or task.endswith(("acceptors", "donors")):
        return "f1"
    return "accuracy" if task == "splice_sites_all" else "mcc"


def species_figures(classes: Sequence[str]) -> tuple[dict[str, dict[int, float]], str] | None:
    """(model -> accuracy by length, source) of the published set that has exactly these species, if any."""
    for names, table, source in SPECIES_SETS.values():
        if sorted(name.lower() for name in classes) == sorted(names):
            return table, SOURCES[source]
    return None
