"""python -m arkcache.cli"""

from arkcache.cli import main

if __name__ == "__main__":
    main()
