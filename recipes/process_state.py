"""What a run changes in its process, for programs that go on afterwards."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from zoo.messages import UserError
from zoo.recipes.errors import Stopped, causes
from zoo.recipes.hooks import HookFailed


@contextmanager
def kept() -> Iterator[None]:
    """At the end of this context, restore what training and evaluation change in the process.

    These are the states of NumPy's and torch's random generators, torch's choice of deterministic kernels, the handlers
    of the log and of the ends of processes, and the way in which processes are started. The memory of the model, on
    GPUs too, is free again, and the processes that load images end. A process group that torchrun describes is kept for
    the next run, and left when the program ends.
    """
    import numpy as np
    import torch

    cuda, cudnn = torch.cuda.is_available(), torch.backends.cudnn
    generators = (np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    on_gpus = torch.cuda.get_rng_state_all() if cuda else []
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    kernels = cudnn.deterministic, cudnn.benchmark
    start_method = multiprocessing.get_start_method(allow_none=True)
    threads = opencv.getNumThreads() if (opencv := _opencv()) else None
    try:
        with _log_kept(), _children_ignored():
            yield
    except BaseException as error:
        _release(error)
        raise
    finally:
        gc.collect()  # a run is full of references in circles
        np.random.set_state(generators[0])  # noqa: NPY002
        torch.set_rng_state(generators[1])
        if cuda:
            torch.cuda.set_rng_state_all(on_gpus)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        cudnn.deterministic, cudnn.benchmark = kernels
        multiprocessing.set_start_method(start_method, force=True)
        if opencv := _opencv():
            opencv.setNumThreads(-1 if threads is None else threads)  # -1 is OpenCV's default


def _release(error: BaseException) -> None:
    """Take the model and the loaders from the frames of a traceback, which notebooks keep until the next error.

    A hook's own frames stay as they are, for its debugger, and so do those of models if an error is not explained.
    """
    explained = isinstance(error, HookFailed | KeyboardInterrupt | Stopped | UserError)
    for cause in [error] if isinstance(error, HookFailed) else causes(error):
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            if explained or frame.f_globals.get("__name__", "").startswith(_WITH_LOADERS):
                with suppress(RuntimeError):  # it is still executed
                    frame.clear()


_WITH_LOADERS = ("zoo.recipes.", "torch.utils.data.", "mmengine.")


def _opencv() -> Any:
    """OpenCV, whose threads MMEngine turns off; None if nothing has imported it."""
    return sys.modules.get("cv2")


@contextmanager
def _children_ignored() -> Iterator[None]:
    """At the end of this context, remove the handler that raises torch's error about a process that loads images.

    It raises in the main thread, whatever that is doing: the event loop of a notebook while another thread trains.
    """
    from torch.utils.data._utils import signal_handling as torchs

    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler, is_set = signal.getsignal(signal.SIGCHLD), torchs._SIGCHLD_handler_set
    try:
        yield
    finally:
        if handler is not None:  # otherwise it is not Python's
            signal.signal(signal.SIGCHLD, handler)
            torchs._SIGCHLD_handler_set = is_set


@contextmanager
def _log_kept() -> Iterator[None]:
    log = logging.getLogger("zoo")
    before, level, propagate = log.handlers[:], log.level, log.propagate
    log.handlers.clear()  # a run closes those that it finds
    try:
        yield
    finally:
        for handler in log.handlers:
            handler.close()
        log.handlers[:] = before
        log.setLevel(level)
        log.propagate = propagate
