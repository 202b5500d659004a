"""Property tests for your own losses, steps, optimizers and runs.

::

    import trainfn.testing as tt

    tt.check_row_additive(loss, model, batch)      # a loss
    tt.check_step(step, state, batch)              # a step: every law below that applies
    tt.check_module(model, loss, batch)            # a module of your own
    tt.check_transform(optimizer)                  # an optimizer
    tt.check_resume_bitexact(make_run)             # a run

A law is one call. It holds, or it raises a `LawViolation`. That shows the smallest batch and split it found, by how
much the numbers differ, the probable cause and the fix. Laws run in plain tests, under ``@given`` and in notebooks;
they change nothing they are given.

=================================== ===================================================================
of a loss
=================================== ===================================================================
`check_row_additive`                total, weight and gradient are sums over the rows
`check_accumulation_invariant`      any micro-batches give the same update
`check_rank_invariant`              any distribution over ranks gives the same update
`check_padding_invariant`           padding rows and positions count for nothing
`check_permutation_invariant`       the order of the rows does not matter
`check_gradients`                   gradients are slopes, by finite differences
`check_split_invariant`             the same as accumulation and ranks, for somebody else's trainer
`check_equivariant`                 a change of the inputs is a change of the result
=================================== ===================================================================

=================================== ===================================================================
of a step
=================================== ===================================================================
`check_step`                        all of these but the last
`check_pure`                        it changes nothing it was given, and nothing around it
`check_deterministic`               same inputs, same bits, whatever the global generators hold
`check_keyed`                       randomness follows the key and the step count
`check_dtype_stable`                structure, dtypes and shapes of the state stay
`check_no_host_sync`                it never waits for the device
`check_single_graph`                one graph, compiled once
`check_eager_equals_compiled`       compiled, the same numbers
`check_donation`                    it may overwrite its state
`check_agrees`                      it takes the steps of a plainer one, to which it is compared
=================================== ===================================================================

=================================== ===================================================================
of the rest
=================================== ===================================================================
`check_module`                      a module trains as in torch's plain loop, whatever it holds
`check_transform`                   an optimizer is a pair of pure functions, and equals its reference
`check_schedule`                    a schedule is a pure function of the step, and equals its reference
`check_sampler`                     a sampler is a pure function of the step, and covers every row
`check_roundtrip`                   what is saved comes back
`check_resume_bitexact`             a run that stops goes on as if it had not
=================================== ===================================================================

Strategies for hypothesis: `batches` of `floats`, `integers` and `masks`, `token_batches`, `masked_batches`, `splits`,
`modules`, `tensors`, `trees`, `states`, `schedules`. They shrink to what can be read.

Needs hypothesis: ``pip install "trainfn[testing]"``.
"""

import importlib.util as _util

if _util.find_spec("hypothesis") is None:
    raise ImportError("trainfn.testing needs hypothesis, which is not installed: `pip install 'trainfn[testing]'`.")

from trainfn.errors import LawViolation as LawViolation
from trainfn.testing._batches import Field as Field
from trainfn.testing._batches import batches as batches
from trainfn.testing._batches import floats as floats
from trainfn.testing._batches import integers as integers
from trainfn.testing._batches import masked_batches as masked_batches
from trainfn.testing._batches import masks as masks
from trainfn.testing._batches import token_batches as token_batches
from trainfn.testing._compiled_laws import check_donation as check_donation
from trainfn.testing._compiled_laws import check_eager_equals_compiled as check_eager_equals_compiled
from trainfn.testing._compiled_laws import check_single_graph as check_single_graph
from trainfn.testing._gradients import check_gradients as check_gradients
from trainfn.testing._loss_laws import check_accumulation_invariant as check_accumulation_invariant
from trainfn.testing._loss_laws import check_padding_invariant as check_padding_invariant
from trainfn.testing._loss_laws import check_permutation_invariant as check_permutation_invariant
from trainfn.testing._loss_laws import check_rank_invariant as check_rank_invariant
from trainfn.testing._loss_laws import check_row_additive as check_row_additive
from trainfn.testing._loss_laws import check_split_invariant as check_split_invariant
from trainfn.testing._module_laws import ModuleReport as ModuleReport
from trainfn.testing._module_laws import check_module as check_module
from trainfn.testing._sampler_laws import check_sampler as check_sampler
from trainfn.testing._search import register_profiles as register_profiles
from trainfn.testing._splits import Piece as Piece
from trainfn.testing._splits import Split as Split
from trainfn.testing._splits import splits as splits
from trainfn.testing._state_laws import check_equivariant as check_equivariant
from trainfn.testing._state_laws import check_resume_bitexact as check_resume_bitexact
from trainfn.testing._state_laws import check_roundtrip as check_roundtrip
from trainfn.testing._step_laws import check_agrees as check_agrees
from trainfn.testing._step_laws import check_deterministic as check_deterministic
from trainfn.testing._step_laws import check_dtype_stable as check_dtype_stable
from trainfn.testing._step_laws import check_keyed as check_keyed
from trainfn.testing._step_laws import check_no_host_sync as check_no_host_sync
from trainfn.testing._step_laws import check_pure as check_pure
from trainfn.testing._suite import Laws as Laws
from trainfn.testing._suite import check_step as check_step
from trainfn.testing._things import modules as modules
from trainfn.testing._things import schedules as schedules
from trainfn.testing._things import states as states
from trainfn.testing._things import tensors as tensors
from trainfn.testing._things import trees as trees
from trainfn.testing._transform_laws import check_schedule as check_schedule
from trainfn.testing._transform_laws import check_transform as check_transform
