"""``python -m archsmith``: the command line, for launchers that take a module (``torchrun -m archsmith ...``)."""

from archsmith.cli import main

if __name__ == "__main__":
    main()
