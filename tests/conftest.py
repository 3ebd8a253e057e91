"""One torch thread, fixed seeds, and the real data where they lie beside the repository."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
try:
    from hypothesis import settings

    # derandomised: the suite runs the same examples every time, like its fixed seeds
    settings.register_profile("invgen", deadline=None, max_examples=25, derandomize=True, database=None)
    settings.load_profile("invgen")
except ImportError:  # the suite needs the dev extra; tests that use hypothesis say so themselves
    pass


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c():
    """A shell starts its background jobs with SIGINT ignored; the tests of Ctrl-C then have none to catch."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeds():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries below still read the global state


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data, `../shared/data` beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data are not here: this test reads ../shared/data beside the repository")
    return folder
