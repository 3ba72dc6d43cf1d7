"""Train and eval steps over a mesh of devices: state in, state out, nothing kept."""

from ._batch import (
    batch_shards as batch_shards,
    batch_size as batch_size,
    check_batch as check_batch,
    own_rows as own_rows,
    pad_batch as pad_batch,
    shard_batch as shard_batch,
)
from ._gradient import StepKeys as StepKeys
from ._mesh import (
    make_mesh as make_mesh,
    place as place,
    replicate as replicate,
)
from ._placement import (
    RULES as RULES,
    RULES_WITHOUT_TENSOR as RULES_WITHOUT_TENSOR,
    Placement as Placement,
    placements as placements,
    state_placement as state_placement,
)
from ._pmap import (
    make_pmap_train_step as make_pmap_train_step,
    pmap_replicate as pmap_replicate,
)
from ._precision import Precision as Precision
from ._steps import (
    TrainState as TrainState,
    init_state as init_state,
    make_eval_step as make_eval_step,
    make_train_step as make_train_step,
    step_keys as step_keys,
)
from ._sweep import (
    SweepState as SweepState,
    make_sweep_eval_step as make_sweep_eval_step,
    make_sweep_train_step as make_sweep_train_step,
    member_state as member_state,
    shard_batches as shard_batches,
    stack_states as stack_states,
)
