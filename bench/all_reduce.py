#!/usr/bin/env python3
"""The all-reduce bench from a checkout, alone or under torchrun; else ``python -m extend_attn bench all-reduce``."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "python"))

from extend_attn.bench import main

if __name__ == "__main__":
    sys.exit(main(["all-reduce", *sys.argv[1:]]))
