"""`python -m tokenpacker.hf serve MODEL` is `transformers serve MODEL` with the model's classes registered.

So are transformers' other commands. Python has imported the package, and so registered them, before it runs this file.
"""

from transformers.cli.transformers import main

if __name__ == "__main__":
    main()
