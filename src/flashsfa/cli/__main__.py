"""`python -m flashsfa.cli`."""

import sys

from . import main

sys.exit(main())
