"""Train vectors from a cache: `probecache train`."""

import sys

from probecache.cli import main

main(["train", *sys.argv[1:]])
