"""What of the libraries' output is left out."""

import logging
import sys
import threading
import warnings
from typing import Any


def one_line_an_event() -> None:
    """Our own messages: one line per event on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)


def quiet_libraries() -> None:
    """Leave out what the many Trainers of a run would repeat. After the imports: Lightning sets its own levels when imported."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "httpx", "datasets", "PIL", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    threading.excepthook = _thread_error
    for message in (
        ".*does not have many workers.*",
        ".*module.s. in eval mode at the start of training.*",  # a frozen vision tower is meant to be
        ".*smaller than the logging interval.*",
        ".*Total length of `list` across ranks is zero.*",  # a stage without validation data
        ".*isinstance.treespec, LeafSpec.*",  # from inside Lightning
    ):
        warnings.filterwarnings("ignore", message=message)


def _thread_error(args: Any) -> None:
    """TensorBoard's writer gives its errors (a full disk) to the main thread too, where they are reported."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)
