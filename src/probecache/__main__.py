"""`python -m probecache` is `probecache`."""

from probecache.cli import main

if __name__ == "__main__":
    main()
