"""Run a model over labelled prompts and cache its activations: `probecache extract`."""

import sys

from probecache.cli import main

sys.argv.insert(1, "extract")
main()
