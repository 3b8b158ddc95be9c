"""`flashsfa` in a process of torchrun on the CPU, with FSDP2 as on GPUs: accelerate leaves it out where processes are of the CPU."""

import os
import sys

import accelerate.state
from torch.distributed.tensor import DTensor

from flashsfa.cli import main
from flashsfa.training.run import RunTrainer

begin, log = accelerate.state.PartialState.__init__, RunTrainer.log


def as_on_gpus(state, *args, **kwargs):
    begin(state, *args, **kwargs)
    if state.distributed_type == accelerate.state.DistributedType.MULTI_CPU:
        state.distributed_type = accelerate.state.DistributedType.MULTI_GPU


def checked_log(trainer, *args, **kwargs):
    assert any(isinstance(x, DTensor) for x in trainer.model.parameters()), "nothing is sharded"
    log(trainer, *args, **kwargs)


accelerate.state.PartialState.__init__ = as_on_gpus
RunTrainer.log = checked_log
code = main()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # shards on a CPU leave a thread that at times aborts a process that ends in the ordinary way
