"""Train and eval steps over a mesh of devices: state in, state out, nothing kept."""

from ._gradient import StepKeys as StepKeys
from ._mesh import (
    batch_shards as batch_shards,
    check_batch as check_batch,
    make_mesh as make_mesh,
    replicate as replicate,
    shard_batch as shard_batch,
)
from ._placement import (
    RULES as RULES,
    Placement as Placement,
    placements as placements,
    state_placement as state_placement,
)
from ._pmap import (
    make_pmap_train_step as make_pmap_train_step,
    pmap_replicate as pmap_replicate,
)
from ._steps import (
    TrainState as TrainState,
    init_state as init_state,
    make_eval_step as make_eval_step,
    make_train_step as make_train_step,
    step_keys as step_keys,
)
