"""``python -m silo`` is the ``silo`` command."""

from silo.cli.main import main

if __name__ == "__main__":
    main()
