__version__ = "0.1.0"

# Before torch is imported, because it is read only then: OpenMP threads that spin while they wait for each other
# slow a training step down by an order of magnitude where another program wants a core too; asleep, they share.
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
