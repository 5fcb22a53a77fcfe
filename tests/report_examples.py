"""An example report with its ledger, and a parser of the rendered page."""

import copy
import math
import random
from html.parser import HTMLParser

from scipy.stats import beta, binom

from ev3_distill.monitor import report as report_page

HOSTILE = "<script>alert(1)</script>"
ARMS = ("kd t=4 adamw", "dkd sgd", HOSTILE, "logit mse")
VOID = {"meta", "br", "hr", "img", "link", "input"}


def make_rows(iterations=60, arms=ARMS):
    """A plausible ledger of an older version: a race, a leader with occasional challengers, rare tests, one rollback."""
    draw = random.Random(0)
    rows, cost, champion, tested_cost, tests = [], 0, 0.1, 0, 0
    for i in range(1, iterations + 1):
        racing = max(1, math.ceil(len(arms) / 2 ** (i - 1)))
        names = list(arms[:racing]) + ([draw.choice(arms[1:])] if racing == 1 and draw.random() < 0.2 else [])
        length = 50 * 1.03**i
        steps = {name: int(length) * (name in names) for name in arms}
        cost += sum(steps.values())
        current = 0.9421 - 0.5 * math.exp(-cost / 1500) + draw.gauss(0, 0.002)
        moved, test = draw.random() < 0.6, None
        verdict = "adopt" if moved else "keep"
        if cost > 1.5 * tested_cost and i > 1:
            tested_cost, alpha, gain = cost, 0.03 / (tests + 1) ** 2, current - champion
            losses = 740 - i
            wins = losses + max(0, round(5000 * gain))
            p_value = float(binom.sf(wins - 1, wins + losses, 0.5))
            bound = (2 * float(beta.ppf(alpha, wins, losses + 1)) - 1) * (wins + losses) / 5000
            test = {"objective": "promise", "hypothesis": "the accuracy is higher than the champion's",
                    "kept": False, "reason": None,
                    "wins": wins, "losses": losses, "n": 5000, "alpha": alpha, "p_value": p_value,
                    "gain": (wins - losses) / 5000, "bound": bound}  # fmt: skip
            promoted = p_value <= alpha
            tests += 1
            verdict, champion = ("promote", current) if promoted else (verdict, champion)
        if i == 41:
            verdict, current = "roll back", champion
        rows.append({
            "iteration": i, "cost": cost, "position": 50 * i, "steps": steps,
            "scores": {name: -0.31 if name in names else None for name in (*arms, "average")},
            "selected": names[0], "discarded": 0, "gain": 0.01, "gain_se": 0.004, "verdict": verdict,
            "arm": names[0], "test": test, "champion_accuracy": champion, "current_accuracy": current,
            "length": length, "wall_s": 1.5 * i,
        })  # fmt: skip
    return rows


def race_rows(arms=ARMS):
    """A ledger with a race: the last two arms leave early, the second at the end; it is asked later, and then a final phase."""
    rows = [{**row, "final": False, "asked": None, "racing": [], "left": []} for row in make_rows(12, arms)]
    leader, second, *others = arms
    for i, row in enumerate(rows):
        racing = arms if i < 2 else (leader, second) if i < 4 else (leader,)
        if i == 8:
            row["asked"], racing = second, (leader, second)
        gaps = {name: -0.01 * (i + 1) * arms.index(name) for name in racing}
        row["steps"] = {name: 50 * (name in racing) for name in arms}
        row["cost"] = sum(sum(one["steps"].values()) for one in rows[: i + 1])
        row["behind"], row["behind_se"] = gaps, {name: 0.004 * (gap < 0) for name, gap in gaps.items()}
        row["proposed_accuracy"] = {name: 0.7 + 0.02 * i + gap for name, gap in gaps.items()}
        row["scores"] = {name: -0.31 if name in racing else None for name in arms}
        row["objective"], row["arm"] = "promise", leader
    rows[0]["racing"] = list(arms)
    rows[1] |= {"racing": [leader, second], "left": others}
    rows[2]["racing"] = [leader, second]
    rows[3]["left"] = [second]
    rows[8] |= {"verdict": "adopt", "arm": second}
    for row in rows[10:]:
        row |= {"final": True, "verdict": "final phase", "test": None}
    return rows


def make_report(rows, arms=ARMS):
    steps = {name: sum(row["steps"][name] for row in rows) for name in arms}
    total = max(1, sum(steps.values()))
    tests = [row for row in rows if row["test"]]
    return {
        "teacher": {"source": "onnx:resnet18-cifar10.onnx", "params": 11173962, "accuracy": 0.95304},
        "student": {"network": "mlp width=512 depth=2", "params": 908421, "accuracy": 0.94449, "agreement": 0.96751,
                    "delivered": "champion"},
        "certificate": {"confidence": 0.95, "claims": [
            {"metric": "accuracy", "point": 0.94449, "lower_bound": 0.94098, "n": 10000},
            {"metric": "agreement", "point": 0.96751, "lower_bound": 0.964, "n": 10000}]},
        "cost": {"wall_s": 312.4, "compile_s": 11.23, "phases": {"compiling": 11.23, "training": 301.17},
                 "steps": total, "examples": 128 * total},
        "iterations": len(rows),
        "promotions": sum(row["verdict"] == "promote" for row in rows),
        "rollbacks": sum(row["verdict"] == "roll back" for row in rows),
        "objectives": {"promise": len(rows)},
        "met": False,
        "control": None,
        "arms": [{"name": name, "share": steps[name] / total, "steps": steps[name], "wins": 30 // (i + 1),
                  "promotions": 5 - i} for i, name in enumerate(arms)],
        "seed": 17,
        "splits": {"explore": 40000, "assess": 5000, "decide": 5001, "test": 10000},
        "data": {"source": "npz:/data/cifar10.npz", "fingerprint": "sha256:9f2c4e1b7ad0",
                 "classes": ["airplane", "cat & dog", HOSTILE]},
        "budget": "20000 steps",
        "error_budget": {"delta": 0.05, "left": 0.0312, "tests": len(tests)},
        "versions": {"jax": "0.10.2", "ev3-distill": "0.1.0", "numpy": "2.4.6"},
        "device": "1 x NVIDIA H200",
        "command": "ev3-distill compress --data /data/cifar10.npz --teacher resnet18.onnx --seed 17",
    }  # fmt: skip


class Page(HTMLParser):
    """Collects tags, attributes and visible text; fails if tags are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th", "p", "li", "h1", "h2", "title"):
            self.words.append(" ")

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())  # turns non-breaking spaces into plain ones


def page_text(report, rows=()):
    return Page(report_page.render(report, list(rows))).text


def changed(report, path, value):
    other = copy.deepcopy(report)
    *parents, last = path.split(".")
    at = other
    for name in parents:
        at = at[name]
    at[last] = value
    return other
