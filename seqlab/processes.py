"""Which process this is when a run has several; from the environment alone, so that it costs no import."""

import os


def is_main_process() -> bool:
    """False in the extra processes that a run on several devices starts."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def is_torchrun() -> bool:
    """Started by torchrun, one process a device: it has decided how many there are (WORLD_SIZE)."""
    return "TORCHELASTIC_RUN_ID" in os.environ
