"""The real DeepSpeed engine behind a step function.

::

    state = tfn.deepspeed.init(model, config="ds.json", values={"train_micro_batch_size_per_gpu": 8})
    step = tfn.deepspeed.train_step(loss)  # the loss that `tfn.train_step` takes
    state, metrics = step(state, rows_of_this_rank)
    tfn.deepspeed.save("runs/ds", state)

(`pip install "trainfn[deepspeed]"`.) Without a config, ``accelerate launch`` has exported one. Start one process per
device with ``accelerate launch``, ``torchrun`` or ``deepspeed``; a plain ``python`` is a world of one.

As in `trainfn.train_step`, the update follows the weighted mean over all rows of all ranks and micro-batches. Dropout
is a function of (seed, step, row of the global batch), on every rank. But the state is a handle on an engine that works
in place. It can be used once, and it can't be copied, forked, compiled or saved by `trainfn.Checkpoints`. DeepSpeed's
checkpoints are pickles: load only files that you trust. `weights` gives plain tensors.

Tested on CPUs, for ZeRO stages 0 to 3; not for mixtures of experts, tensor or sequence parallelism.
"""

from trainfn.deepspeed._config import autos as autos
from trainfn.deepspeed._engine import EngineState as EngineState
from trainfn.deepspeed._engine import close as close
from trainfn.deepspeed._engine import init as init
from trainfn.deepspeed._files import restore as restore
from trainfn.deepspeed._files import save as save
from trainfn.deepspeed._files import saving as saving
from trainfn.deepspeed._files import weights as weights
from trainfn.deepspeed._step import eval_step as eval_step
from trainfn.deepspeed._step import train_step as train_step
