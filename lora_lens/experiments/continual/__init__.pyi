from .formulas import (
    accuracy_curve as accuracy_curve,
    average_accuracy as average_accuracy,
    average_forgetting as average_forgetting,
    backward_transfer as backward_transfer,
    forgetting_curve as forgetting_curve,
    forward_transfer as forward_transfer,
    intransigence as intransigence,
    learning_accuracy as learning_accuracy,
)
from .metrics import (
    accuracy_matrix as accuracy_matrix,
    continual_scores as continual_scores,
    score_means as score_means,
)
from .sequence_sweeps import ContinualSweep as ContinualSweep, continual_sweep as continual_sweep
from .strategies import (
    Continued as Continued,
    Joint as Joint,
    Merged as Merged,
    Moving as Moving,
    Separate as Separate,
)
