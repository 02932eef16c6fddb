"""What runs on the GPU, or on the processor where there is none."""

import os

# PyTorch's threads sleep while they wait for each other instead of spinning. With spinning, one other program on a core
# makes a click ten times slower, because the thread that is waited for does not get that core. OpenMP reads this when
# PyTorch is imported, which nobody does before this package.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
