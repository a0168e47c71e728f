"""`python -m handloom`: the command line."""

from __future__ import annotations

from handloom.cli import main

if __name__ == "__main__":
    main()
