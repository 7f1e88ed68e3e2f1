"""One thread per process: on two busy cores, two threads of tiny matrix products wait for each other more than they work.

Ctrl-C is heard even where the suite was started by a shell that ignores it, as one in the background does: tests send it.
"""

import os
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
