"""Several processes that a launcher starts, and the plan that it was configured with.

::

    launch = tfn.launch.settings()           in every process, first of all
    state = tfn.shard(tfn.init(model, optimizer), launch.plan)
    step = tfn.train_step(loss, optimizer, plan=launch.plan)
    print(launch)                            the fate of each field of the configuration

================================================  ==========================================================
started by                                        is
================================================  ==========================================================
``python script.py``                              one process
``torchrun --nproc_per_node N script.py``         N processes with the same state: `Plan.replicated`
``accelerate launch [--config_file F] script.py`` the file of ``accelerate config``: DDP, FSDP 1 and 2, mixed
                                                  precision, compilation, parallelism
``notebook_launcher(train, num_processes=N)``     N processes, from a notebook
================================================  ==========================================================

The processes exchange small values on the host by one object::

    ranks = tfn.launch.ranks()               after `settings`, in every process
    path = ranks.first(make_a_folder)        called on rank 0 only, returned on all; an error is raised on all

All of this works on CPUs and on GPUs. ``trainfn test`` launches with your configuration, and checks that N ranks
compute the same numbers as one.
"""

from trainfn._ranks._group import Ranks as Ranks
from trainfn._ranks._group import ranks as ranks
from trainfn.launch._fields import Field as Field
from trainfn.launch._fsdp import fsdp_plan as fsdp_plan
from trainfn.launch._join import join as join
from trainfn.launch._json import DeepSpeedJson as DeepSpeedJson
from trainfn.launch._settings import Launch as Launch
from trainfn.launch._settings import deepspeed_config as deepspeed_config
from trainfn.launch._settings import plan as plan
from trainfn.launch._settings import settings as settings
from trainfn.launch._tensor import tensor_rules as tensor_rules
