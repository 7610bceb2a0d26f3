from . import measures as measures
from .adaptable_layers import target_layers as target_layers
from .comparison import (
    Change as Change,
    change as change,
    compare as compare,
    intruder_dimensions as intruder_dimensions,
    overlap as overlap,
    overlap_matrix as overlap_matrix,
    principal_angles as principal_angles,
)
from .factorizing import factorize as factorize, spectra as spectra
from .layer_selection import (
    kappa_targets as kappa_targets,
    rank_layers as rank_layers,
    select_layers as select_layers,
    to_yaml as to_yaml,
)
from .metric import Metric as Metric
from .patterns import part_of as part_of
from .placement import (
    AfterEnergy as AfterEnergy,
    AtEffectiveRank as AtEffectiveRank,
    ByLayer as ByLayer,
    Components as Components,
    HoldingEnergy as HoldingEnergy,
    RandomComponents as RandomComponents,
    SpreadComponents as SpreadComponents,
)
from .sources.matrices import Weight as Weight, weights as weights
from .spectrum import Spectrum as Spectrum, SpectrumSet as SpectrumSet
from .window import Placement as Placement, Window as Window, windows as windows
