import sys

from monologue.cli import main

sys.exit(main())
