"""Train vectors from a cache: `probecache train`."""

import sys

from probecache.cli import main

sys.argv.insert(1, "train")
main()
