from ._style import house_style as house_style
from .after_training import growth as growth, rewinding as rewinding
from .continual import (
    accuracy_heatmap as accuracy_heatmap,
    accuracy_over_time as accuracy_over_time,
    update_over_time as update_over_time,
    window_survival as window_survival,
)
from .continual_scores import (
    continual_tradeoff as continual_tradeoff,
    forgetting_by_position as forgetting_by_position,
)
from .drift import (
    against_forgetting as against_forgetting,
    predictors as predictors,
    rotation_matrix as rotation_matrix,
    shares as shares,
)
from .examples import confusion as confusion, forgotten_examples as forgotten_examples
from .settings import by_setting as by_setting
from .single_runs import learning_curve as learning_curve, learning_curves as learning_curves
from .spectra import (
    by_depth as by_depth,
    cumulative_energy as cumulative_energy,
    overlap as overlap,
    small_multiples as small_multiples,
    spectrum as spectrum,
)
from .sweeps import (
    accuracy_curve as accuracy_curve,
    forgetting_curve as forgetting_curve,
    tradeoff as tradeoff,
    watched as watched,
)
from .texts import token_shares as token_shares
from .trade_offs import (
    comparison as comparison,
    fronts_by_method as fronts_by_method,
    robustness as robustness,
    surface as surface,
)
from .windows import decomposition as decomposition, feature_maps as feature_maps
