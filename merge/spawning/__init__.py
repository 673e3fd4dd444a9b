"""Networks forked from one training: when does the path between them become straight?"""

from .forking import spawn
from .spawning import Spawning
from .training import Checkpoint, Train

__all__ = ["Checkpoint", "Spawning", "Train", "spawn"]
