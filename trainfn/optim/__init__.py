"""Optimizers, and the transforms they are sentences of.

A `Transform` is a pair of pure functions: ``init(params) -> state`` and ``update(updates, state, params) ->
(updates, state)``. What comes out of the last one of a chain is added to the parameters, so
``adamw(lr)`` is ``chain(scale_by_adam(), add_decayed_weights(0.01), scale_by_learning_rate(lr))``.

========================================================== ============================================================
a moment or two per number of the parameters               `sgd`, `adam`, `adamw`, `lion`, `rmsprop`, `adagrad`, `muon`
less: two vectors per matrix, or moments of low rank       `adafactor`, `adalomo`; `galore_adamw`, `galore_adafactor`
none                                                       `sgd` without momentum, `lomo`
around another rule                                        `galore`, `lookahead`, `masked`, `partition`, `freeze`
========================================================== ============================================================
"""

from trainfn._types import Transform as Transform
from trainfn.optim._adafactor import ScaleByFactoredRmsState as ScaleByFactoredRmsState
from trainfn.optim._adafactor import adafactor as adafactor
from trainfn.optim._adafactor import scale_by_factored_rms as scale_by_factored_rms
from trainfn.optim._adafactor import scale_by_param_rms as scale_by_param_rms
from trainfn.optim._aliases import adagrad as adagrad
from trainfn.optim._aliases import adam as adam
from trainfn.optim._aliases import adamw as adamw
from trainfn.optim._aliases import lion as lion
from trainfn.optim._aliases import rmsprop as rmsprop
from trainfn.optim._aliases import sgd as sgd
from trainfn.optim._clip import clip_by_block_rms as clip_by_block_rms
from trainfn.optim._clip import clip_by_global_norm as clip_by_global_norm
from trainfn.optim._clip import clip_by_value as clip_by_value
from trainfn.optim._combine import EmptyState as EmptyState
from trainfn.optim._combine import MaskedState as MaskedState
from trainfn.optim._combine import PartitionState as PartitionState
from trainfn.optim._combine import chain as chain
from trainfn.optim._combine import freeze as freeze
from trainfn.optim._combine import identity as identity
from trainfn.optim._combine import masked as masked
from trainfn.optim._combine import partition as partition
from trainfn.optim._decay import add_decayed_weights as add_decayed_weights
from trainfn.optim._galore import GaloreState as GaloreState
from trainfn.optim._galore import galore as galore
from trainfn.optim._galore import galore_adafactor as galore_adafactor
from trainfn.optim._galore import galore_adamw as galore_adamw
from trainfn.optim._hyperparams import InjectState as InjectState
from trainfn.optim._hyperparams import get_hyperparams as get_hyperparams
from trainfn.optim._hyperparams import inject_hyperparams as inject_hyperparams
from trainfn.optim._hyperparams import set_hyperparams as set_hyperparams
from trainfn.optim._lomo import adalomo as adalomo
from trainfn.optim._lomo import lomo as lomo
from trainfn.optim._masks import NO_DECAY as NO_DECAY
from trainfn.optim._masks import Labels as Labels
from trainfn.optim._masks import Mask as Mask
from trainfn.optim._masks import decay_mask as decay_mask
from trainfn.optim._math import Rate as Rate
from trainfn.optim._math import Scalar as Scalar
from trainfn.optim._muon import NOT_MUON as NOT_MUON
from trainfn.optim._muon import ScaleByMuonState as ScaleByMuonState
from trainfn.optim._muon import muon as muon
from trainfn.optim._muon import muon_labels as muon_labels
from trainfn.optim._muon import orthogonalize as orthogonalize
from trainfn.optim._muon import scale_by_muon as scale_by_muon
from trainfn.optim._muon import scale_by_shape as scale_by_shape
from trainfn.optim._scale import ScaleByAdagradState as ScaleByAdagradState
from trainfn.optim._scale import ScaleByAdamState as ScaleByAdamState
from trainfn.optim._scale import ScaleByLionState as ScaleByLionState
from trainfn.optim._scale import ScaleByOwnScheduleState as ScaleByOwnScheduleState
from trainfn.optim._scale import ScaleByRmsState as ScaleByRmsState
from trainfn.optim._scale import ScaleByScheduleState as ScaleByScheduleState
from trainfn.optim._scale import TraceState as TraceState
from trainfn.optim._scale import scale as scale
from trainfn.optim._scale import scale_by_adagrad as scale_by_adagrad
from trainfn.optim._scale import scale_by_adam as scale_by_adam
from trainfn.optim._scale import scale_by_learning_rate as scale_by_learning_rate
from trainfn.optim._scale import scale_by_lion as scale_by_lion
from trainfn.optim._scale import scale_by_rms as scale_by_rms
from trainfn.optim._scale import scale_by_schedule as scale_by_schedule
from trainfn.optim._scale import trace as trace
from trainfn.optim._wrappers import EmaState as EmaState
from trainfn.optim._wrappers import LookaheadState as LookaheadState
from trainfn.optim._wrappers import ema as ema
from trainfn.optim._wrappers import lookahead as lookahead
