"""Score a cache with vectors: `probecache validate`."""

import sys

from probecache.cli import main

main(["validate", *sys.argv[1:]])
