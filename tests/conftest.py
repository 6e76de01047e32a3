"""What all tests share: one thread per process, no hub, and models that the tests make."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two test runs on two cores spin on each other's threads; tiny models gain nothing from a second.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
