"""The published command line: `python generate_act_scale_shift.py --model MODEL`."""

import sys

from lrquant.cli import statistics_main

sys.exit(statistics_main())
