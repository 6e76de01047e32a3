"""Run a model over labelled prompts and cache its activations: `probecache extract`."""

import sys

from probecache.cli import main

main(["extract", *sys.argv[1:]])
