"""`python -m ev3_distill` runs the command line."""

from ev3_distill.cli.main import run

if __name__ == "__main__":
    run()
