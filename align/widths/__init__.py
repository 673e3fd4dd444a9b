"""Networks of one architecture and unequal widths: which units correspond, which are left over, and their fusion."""

from .fusion import Fusion, ot_fusion
from .matching import Surplus, WidthMatching, match_widths

__all__ = ["Fusion", "Surplus", "WidthMatching", "match_widths", "ot_fusion"]
