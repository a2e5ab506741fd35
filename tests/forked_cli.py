"""Starts the command line many times without paying for the imports again: each line of input is one process.

Input lines are JSON lists of arguments. For each a child is forked that is the command line from there on (no thread
exists at that moment), and two lines come back: the child's process id, and its status when it has ended. Checkpoints
are saved at every epoch instead of every two seconds, so that a short run has many places to resume from.
"""

import functools
import json
import os
import sys

import onnx
import onnxruntime
import onnxscript
import sklearn.datasets
import torch
from torch.utils.tensorboard import SummaryWriter

from archsmith import api
from archsmith.cli import main

assert onnx and onnxruntime and onnxscript and sklearn.datasets and torch and SummaryWriter


def serve(output: str) -> None:
    api.drive = functools.partial(api.drive, checkpoint_seconds=0.0)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            stream = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            os.setsid()
            status = 0
            try:
                main(json.loads(line))
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                status = 70
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
