"""Train vectors straight from a model, keeping no cache: `probecache train`."""

import sys

from probecache.cli import main

sys.argv.insert(1, "train")
main()
