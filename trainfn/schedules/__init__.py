"""Schedules: functions of the number of completed updates, tensors in and out, so that they never recompile.

The two that react to a metric, `reduce_on_plateau` and `greedy`, are a `Controller`: a pair of pure
functions.
"""

from trainfn._types import Schedule as Schedule
from trainfn.schedules._combine import join as join
from trainfn.schedules._combine import scale as scale
from trainfn.schedules._combine import warmup as warmup
from trainfn.schedules._controllers import Controller as Controller
from trainfn.schedules._controllers import GreedyState as GreedyState
from trainfn.schedules._controllers import PlateauState as PlateauState
from trainfn.schedules._controllers import greedy as greedy
from trainfn.schedules._controllers import reduce_on_plateau as reduce_on_plateau
from trainfn.schedules._shapes import constant as constant
from trainfn.schedules._shapes import constant_with_warmup as constant_with_warmup
from trainfn.schedules._shapes import cosine as cosine
from trainfn.schedules._shapes import cosine_warmup_with_min_lr as cosine_warmup_with_min_lr
from trainfn.schedules._shapes import cosine_with_min_lr as cosine_with_min_lr
from trainfn.schedules._shapes import cosine_with_restarts as cosine_with_restarts
from trainfn.schedules._shapes import inverse_sqrt as inverse_sqrt
from trainfn.schedules._shapes import linear as linear
from trainfn.schedules._shapes import polynomial as polynomial
from trainfn.schedules._shapes import warmup_stable_decay as warmup_stable_decay
