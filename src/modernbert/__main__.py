"""`python -m modernbert` is the command line."""

from modernbert.cli import main

if __name__ == "__main__":
    main()
