from .aggregate import pareto_front as pareto_front, seed_means as seed_means
from .basis_rotation import rotations as rotations, turned as turned
from .examples import (
    confusion as confusion,
    forgetting_interval as forgetting_interval,
    forgotten_by as forgotten_by,
    forgotten_by_one as forgotten_by_one,
    transitions as transitions,
)
from .fair_comparison import (
    at_equal_rate as at_equal_rate,
    at_matched_accuracy as at_matched_accuracy,
    at_matched_update as at_matched_update,
    at_own_best_rate as at_own_best_rate,
    relative_updates as relative_updates,
    seed_interval as seed_interval,
)
from .features import (
    FeatureEnergies as FeatureEnergies,
    FeatureNorms as FeatureNorms,
    FeatureSplit as FeatureSplit,
    feature_energies as feature_energies,
    feature_split as feature_split,
    patch_grid as patch_grid,
)
from .first_order import foresee as foresee
from .generations import replies as replies, replies_before_after as replies_before_after
from .measuring import Growth as Growth, Measured as Measured, growth as growth, measure as measure
from .neighbours import neighbour_agreement as neighbour_agreement, neighbour_table as neighbour_table
from .paired_comparison import against_baseline as against_baseline, early_updates as early_updates
from .pareto import dominance as dominance, front_by_method as front_by_method, hypervolume as hypervolume
from .peft_comparison import (
    method_comparison as method_comparison,
    method_comparison_experiment as method_comparison_experiment,
)
from .predictors import by_run as by_run, predict_forgetting as predict_forgetting
from .rate_ranges import rate_robustness as rate_robustness
from .representations import feature_change as feature_change
from .rewind_paths import (
    FirstComponents as FirstComponents,
    Intruders as Intruders,
    MostMoved as MostMoved,
    SmallValues as SmallValues,
    WholeUpdate as WholeUpdate,
)
from .rewinding import rewind as rewind
from .rewound import Point as Point, Rewound as Rewound
from .u_shape import UShape as UShape, u_shape_test as u_shape_test
from .weight_drift import drift as drift
