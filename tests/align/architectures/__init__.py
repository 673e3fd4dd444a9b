"""Small networks of every common architecture, each with its whole symmetry derived by hand.

Loaded by path, since tests share no package: see `test_align_architectures.py`.
"""

from .attention import ATTENTION
from .channels import CHANNELS
from .convolution import CONVOLUTION
from .experts import EXPERTS
from .gates import GATES
from .language import LANGUAGE
from .norms import NORMS
from .recurrent import RECURRENT
from .spec import Architecture, matched, multiset
from .torch_attention import TORCH_ATTENTION
from .vision import VISION

ARCHITECTURES = (
    ATTENTION | TORCH_ATTENTION | LANGUAGE | VISION | CONVOLUTION | CHANNELS | NORMS | GATES | RECURRENT | EXPERTS
)

__all__ = ["ARCHITECTURES", "Architecture", "matched", "multiset"]
