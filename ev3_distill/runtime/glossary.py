"""Terms that progress lines, the live view and reports use, each explained in this one place."""

TERMS = {
    "arm": "a way to train: a loss with an optimizer, or an evolution strategy",
    "assess": "the held-out split on which the proposals of all arms are scored and one is selected",
    "decide": "the held-out split on which promotions are tested",
    "test": "the sealed split, opened once for the certificate",
    "current": "the student that training continues from, scored on assess",
    "champion": "the best student so far, proven by tests on decide",
    "race": "the start of a run, in which each arm trains a student of its own and those clearly behind on assess leave",
    "leader": "the arm that trains on after the race, until the proposal of another arm becomes the current student",
    "asked": "nothing had moved, so another arm starts from the current student and trains beside the leader for an iteration",
    "keep": "no proposal was better; the current student stays",
    "adopt": "the selected proposal becomes the current student",
    "promote": "the selected proposal also becomes the champion, after a passed test on decide",
    "roll back": "training returns to the champion",
    "final phase": "the end of a run, in which the leader trains on assess and decide, too, and nothing is decided any more",
    "error budget": "the probability that any promotion of the run is wrong; every test on decide spends a part of it",
}


def explain(*terms: str) -> str:
    """One line that explains some terms of TERMS."""
    return "; ".join(f"{term}: {TERMS[term]}" for term in terms)
