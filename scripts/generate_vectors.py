"""Train vectors straight from a model, keeping no cache: `probecache train`."""

import sys

from probecache.cli import main

main(["train", *sys.argv[1:]])
