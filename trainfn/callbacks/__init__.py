"""Callbacks for `trainfn.fit`: log, show progress, evaluate, stop early, keep the best.

::

    tfn.fit(step, state, batches, until=10_000, callbacks=[
        tfn.callbacks.progress(),
        tfn.callbacks.log(100),
        tfn.callbacks.evaluation(eval_step, held_out, every=500, then=[
            tfn.callbacks.log(1),
            tfn.callbacks.early_stopping("eval_loss", patience=3),
        ]),
    ])

A callback is a function of a `StepInfo`; returning `trainfn.Stop` ends the run. One that needs more, such as a state
that checkpoints keep, inherits from `trainfn.Callback` and writes the methods that it needs.
"""

from trainfn.callbacks._evaluation import early_stopping as early_stopping
from trainfn.callbacks._evaluation import evaluation as evaluation
from trainfn.callbacks._evaluation import keep_best as keep_best
from trainfn.callbacks._log import every as every
from trainfn.callbacks._log import log as log
from trainfn.callbacks._log import values as values
from trainfn.callbacks._log import window as window
from trainfn.callbacks._progress import progress as progress
