#!/usr/bin/env python3
"""The attention bench from a checkout; ``python -m extend_attn bench attention`` where the package is installed."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "python"))

from extend_attn.bench import main

if __name__ == "__main__":
    sys.exit(main(["attention", *sys.argv[1:]]))
