"""Terms that progress lines, the live view and reports use, each explained in this one place."""

TERMS = {
    "arm": "a way to train: a loss with an optimizer, or an evolution strategy",
    "assess": "the held-out split on which the proposals of all arms are scored and one is selected",
    "decide": "the held-out split on which promotions are tested",
    "test": "the sealed split, opened once for the certificate",
    "current": "the student that training continues from, scored on assess",
    "champion": "the best student so far, proven by tests on decide",
    "keep": "no proposal was better; the current student stays",
    "adopt": "the selected proposal becomes the current student",
    "promote": "the selected proposal also becomes the champion, after a passed test on decide",
    "roll back": "training returns to the champion",
    "error budget": "the probability that any promotion of the run is wrong; every test on decide spends a part of it",
}


def explain(*terms: str) -> str:
    """One line that explains some terms of TERMS."""
    return "; ".join(f"{term}: {TERMS[term]}" for term in terms)
