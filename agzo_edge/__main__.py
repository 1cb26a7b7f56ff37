"""`python -m agzo_edge` is the command `agzo-edge`."""

from agzo_edge.cli import main

if __name__ == "__main__":
    main()
