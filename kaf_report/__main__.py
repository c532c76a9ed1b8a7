"""`python -m kaf_report`."""

import sys

from kaf_report.cli import main

sys.exit(main())
