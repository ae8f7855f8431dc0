"""`python -m tokenpacker` is the command `tokenpacker`."""

from tokenpacker.cli import main

if __name__ == "__main__":
    main()
