"""SIGTERM in a run of several processes: from a scheduler whose time is up, or from torchrun, which has lost one of them. And
SIGHUP in any run: from a terminal that was closed, or a connection that was lost."""

import contextlib
import os
import signal
import sys
import threading
import time

import lightning
from lightning.pytorch.callbacks import Callback

from seqlab.training.module import TrainingModule

PATIENCE = 5.0  # seconds, or three steps where those take longer: how long a process that was told to end may go on
LIMIT = 25.0  # torchrun and Slurm kill after 30


class Termination(Callback):
    """Ends the run with the step, in all processes, as Ctrl-C does; and at once where that step does not end, because it waits
    for a process that is gone.

    Lightning's own handler takes part in a broadcast, in the middle of whatever else the processes exchange, and a handler
    in Python is not called at all while its thread waits in a collective: here a second thread, which the signal wakes
    through a pipe, looks whether the first one goes on.
    """

    def __init__(self, last_word: str):
        self.last_word = last_word  # what a process that ends so says
        self._began, self._longest = 0.0, 0.0  # when this step began, and what the longest one took, in seconds
        self._pipe: tuple[int, int] | None = None
        self._hangup = None  # what SIGHUP did before

    def on_train_start(self, trainer: lightning.Trainer, module: TrainingModule) -> None:  # Lightning's handler is in place
        if threading.current_thread() is not threading.main_thread():
            return

        def handler(number, frame) -> None:
            module.stop_asked = True

        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # under nohup it is ignored, and stays so
            self._hangup = signal.signal(signal.SIGHUP, handler)
        if trainer.world_size == 1:
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, handler)
        threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        self._began = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        now = time.monotonic()
        self._longest, self._began = max(self._longest, now - self._began), now

    def _watch(self, pipe: int) -> None:
        with contextlib.closing(os.fdopen(pipe, "rb", buffering=0)) as signals:
            while byte := signals.read(1):
                if byte[0] == signal.SIGTERM:
                    break
            else:
                return  # the run has ended
            deadline = time.monotonic() + min(LIMIT, max(PATIENCE, 3 * self._longest))
            while self._pipe is not None:
                if time.monotonic() > deadline:
                    print(f"error: {self.last_word}", file=sys.stderr, flush=True)
                    os._exit(128 + signal.SIGTERM)
                time.sleep(0.1)

    def on_exception(self, trainer, module, exception) -> None:
        self._stop()

    def teardown(self, trainer, module, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:  # Lightning puts back the other handlers from before
        if self._hangup is not None:
            signal.signal(signal.SIGHUP, self._hangup)
            self._hangup = None
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            writer, self._pipe = self._pipe[1], None
            os.close(writer)
