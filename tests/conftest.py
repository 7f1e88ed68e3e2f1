"""One thread per process: on two busy cores, two threads of tiny matrix products wait for each other more than they work."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
