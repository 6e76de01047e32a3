"""Run a model over prompts and score them with vectors: `probecache validate`."""

import sys

from probecache.cli import main

sys.argv.insert(1, "validate")
main()
