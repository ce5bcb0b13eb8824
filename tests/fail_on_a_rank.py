"""A script in which one rank fails while it logs a step:
python tests/fail_on_a_rank.py RANK STEP error|memory|signal|kill script.py --flag ..."""
import importlib
import os
import signal
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import common.run  # noqa: E402
from common.distributed import rank  # noqa: E402
from common.tokenizer import InputError  # noqa: E402

failing_rank, failing_step = int(sys.argv[1]), int(sys.argv[2])
how = sys.argv[3]
sys.argv = sys.argv[4:]
torch.set_num_threads(1)
log = common.run.Run.log


def log_or_fail(self, step, metrics):
    if rank() == failing_rank and step == failing_step:
        if how == "error":
            raise InputError("rank 1 met a bad row")
        if how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 1")
        os.kill(os.getpid(), signal.SIGTERM if how == "signal" else signal.SIGKILL)
    return log(self, step, metrics)


common.run.Run.log = log_or_fail
script = importlib.import_module(sys.argv[0][:-3])
common.run.main(script.train, script.Config)
