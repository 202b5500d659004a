"""Losses: functions of outputs and targets that return `Mean(total, weight)`, a sum that is not divided yet.

A loss adds up over rows: for any cut into micro-batches or ranks, the sum of the pieces' means is the batch's mean.
`info_nce` with in-batch negatives is the exception, for it couples the rows.

======================== ============================ ==================================
loss                     takes                        the weight counts
======================== ============================ ==================================
`cross_entropy`          ``logits[..., C]``           rows, or their class weights
`next_token`             ``logits[..., T, C]``        predicted tokens
`linear_cross_entropy`   ``hidden[..., D]``           rows
`kl`                     ``logits[..., C]``           rows
`binary_cross_entropy`   ``logits[...]``              elements
`mse`, `mae`, `huber`    ``predictions[...]``         elements
`info_nce`               ``queries[N, D]``            rows
======================== ============================ ==================================

A row is one index of the leading dimensions ``...``. Totals are summed in float32, or in float64 for such
inputs. `total` adds several losses, each divided by its own weight.
``weights`` multiply both the total and the weight, so a mask is a weight of 0 and 1.
"""

from trainfn.losses._categorical import cross_entropy as cross_entropy
from trainfn.losses._categorical import kl as kl
from trainfn.losses._categorical import next_token as next_token
from trainfn.losses._contrastive import info_nce as info_nce
from trainfn.losses._elementwise import binary_cross_entropy as binary_cross_entropy
from trainfn.losses._elementwise import huber as huber
from trainfn.losses._elementwise import mae as mae
from trainfn.losses._elementwise import mse as mse
from trainfn.losses._linear import linear_cross_entropy as linear_cross_entropy
from trainfn.losses._total import total as total
