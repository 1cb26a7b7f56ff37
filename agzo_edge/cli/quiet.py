"""Keeping other libraries' chatter off the user's screen. A library call of ours leaves it alone."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """While the block runs, other libraries say nothing short of an error; `python -W` is obeyed.

    Must be entered before they are imported: they read these settings then.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else each retry of a lost connection is told
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns after a fork otherwise
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # On import it warns about the package `kernels`, which we do not use: our matmul is our own.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


def hide_loading_bars() -> None:
    """Take transformers' bars away ("Loading weights"), and leave downloads theirs on a terminal."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    wants_downloads = sys.stderr.isatty() and not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # silences the hub's as well
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # datasets is slow to import, and rarely needed
    if wants_downloads:
        enable_progress_bars()
