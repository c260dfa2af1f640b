"""The published command line: `python main.py --model MODEL --wbits 4 --abits 4 --lwc --let …`."""

import sys

from lrquant.cli import quantize_main

sys.exit(quantize_main())
