"""The command line: python -m mmkit."""

from .cli.commands import main

if __name__ == "__main__":
    main()
