"""`python -m ev3_distill` runs the command line."""

from ev3_distill.cli.main import main

if __name__ == "__main__":
    main()
