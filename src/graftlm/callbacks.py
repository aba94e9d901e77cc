"""What graftlm's own runs add to a Trainer: a quiet progress bar, a clock that survives a resume, a clean stop."""

import math
import signal
import threading
import time

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback


class ProgressBar(ProgressCallback):
    """Transformers' bar with the last loss and metric behind it, instead of a line of text for every log entry."""

    def __init__(self, max_str_len: int = 100):
        super().__init__(max_str_len)
        self._shown: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            last = ("loss", args.metric_for_best_model)
            self._shown |= {key: f"{value:.3g}" for key, value in (logs or {}).items() if key in last}
            self.training_bar.set_postfix(self._shown)


class TrainingClock(TrainerCallback, ExportableState):
    """Wall-clock seconds of training, added up over interruptions through the checkpoints."""

    def __init__(self):
        self._earlier = 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds up to now, those before a resume included."""
        return self._earlier + (time.perf_counter() - self._began if self._began is not None else 0.0)

    def state(self) -> dict:
        """What a Trainer writes into a checkpoint."""
        return {"args": {}, "attributes": {"_earlier": self.seconds}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved:
            self._earlier = (saved[0] if isinstance(saved, list) else saved)["attributes"]["_earlier"]
        self._began = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self._earlier, self._began = self.seconds, None


class StopAndSave(TrainerCallback):
    """Ctrl-C once: finish the step, save a checkpoint, stop. Twice: stop at once; the last checkpoint stays.

    Only in a run of one process: several would stop at different steps and wait for each other.
    """

    def __init__(self):
        self.stopped = False
        self._before = None

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._stop)

    def _stop(self, number, frame):
        self.stopped = True
        self.restore()

    def on_step_end(self, args, state, control, **kwargs):
        if self.stopped:
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """Trainer takes the stop for the end of an epoch; evaluating in the middle of one would draw random numbers."""
        if self.stopped:
            control.should_save = True
            if not math.isclose(state.epoch, round(state.epoch), abs_tol=1e-9):
                control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Puts the earlier handler of SIGINT back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
