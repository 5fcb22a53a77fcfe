"""Search for the smallest student that meets its guards."""

from ev3_distill.search.archive import Archive, Entry, pick
from ev3_distill.search.search import run_search
from ev3_distill.search.sizes import first_network

__all__ = ["Archive", "Entry", "first_network", "pick", "run_search"]
