"""The race of a run, from its ledger rows alone: which arms raced, how far each came, why it left, and which were asked later.

Steps are those of each arm alone. Scores and differences are on assess, in the units of the score.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ev3_distill.runtime.ledger import MOVES

Row = Mapping[str, Any]


def race_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of the iterations in which arms raced; none in ledgers of older versions.

    Args:
      rows: of a ledger. In a search only its first size races.
    """
    if not rows or "racing" not in rows[0]:
        return []
    first_size = [row for row in rows if row.get("size") == rows[0].get("size")]
    raced: list[Row] = []
    for row in first_size:
        begun = raced or row["racing"] or row["left"]
        raced += [row] if begun else []
        if not row["racing"]:
            break
    return raced


def race_of(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The record of a run's race, for report.json; None if no arm raced and none was asked later.

    Its entries: `over`, whether the race came to its end; `leader`, the arm that led then; `arms`, see `_record_of_arm`; and
    `asked`, the arms that trained beside the leader later because nothing had moved: `name`, `times`, `steps`, and how often
    that `helped`, so that its proposal became the current student and the arm led.

    Args:
      rows: of a ledger.
    """
    raced, asked = race_rows(rows), _asked_later(rows)
    if not raced and not asked:
        return None
    leader = leader_after(raced[-1]) if raced else None
    return {
        "over": leader is not None,
        "leader": leader,
        "arms": [_record_of_arm(name, raced) for name in (trained(raced[0]) if raced else ())],
        "asked": asked,
    }


def trained(row: Row) -> list[str]:
    """The arms that trained in an iteration."""
    return [name for name, steps in row["steps"].items() if steps]


def leader_after(row: Row) -> str | None:
    """The arm that leads after an iteration of the race; None while the race goes on."""
    return None if row["racing"] else next((name for name in trained(row) if name not in row["left"]), None)


def _record_of_arm(name: str, raced: Sequence[Row]) -> dict[str, Any]:
    """An arm in the race: `name`, its own `steps` in it, its last promise `score`, and when and why it `left`.

    `left` is None for an arm that did not leave. Else it has the `iteration`, the `cost` of the run by then, the name of the
    best arm of that iteration, `best`, and by how much the arm was `behind` it with `behind_se`, in the score named
    `objective`; None if its proposal was not finite. `best` is None, too, if only the leader trained as the race ended.
    """
    scores = [score for row in raced if (score := proposed_scores(row).get(name)) is not None]
    last = raced[-1]
    ended = [last] if name != leader_after(last) is not None else []
    row = next((row for row in [*(row for row in raced if name in row["left"]), *ended]), None)
    left = None
    if row is not None:
        left = {key: row[key] for key in ("iteration", "cost", "objective")}
        left |= {"best": best_of(row) if name in row["behind"] else None}
        left |= {key: row[key].get(name) for key in ("behind", "behind_se")}
    return {
        "name": name,
        "steps": sum(row["steps"].get(name, 0) for row in raced),
        "score": scores[-1] if scores else None,
        "left": left,
    }


def _asked_later(rows: Sequence[Row]) -> list[dict[str, Any]]:
    asking = [row for row in rows if row.get("asked")]
    records = []
    for name in dict.fromkeys(row["asked"] for row in asking):
        own = [row for row in asking if row["asked"] == name]
        helped = [row for row in own if row["verdict"] in MOVES and row["arm"] == name]
        steps = sum(row["steps"][name] for row in own)
        records.append({"name": name, "times": len(own), "steps": steps, "helped": len(helped)})
    return records


def proposed_scores(row: Row) -> dict[str, float | None]:
    """The promise scores on assess of the proposals of an iteration, by arm."""
    return next((scores for name, scores in row.items() if name.startswith("proposed_")), {})


def best_of(row: Row) -> str | None:
    """The arm with the best proposal of an iteration, in the score that ruled it; None if none was finite."""
    behind = {name: gap for name, gap in row["behind"].items() if gap is not None}
    return max(behind, key=behind.__getitem__) if behind else None


def race_news(row: Row) -> str:
    """What an iteration changed in the race, in one line; empty if nothing."""
    if not row.get("left"):
        return ""
    leader = leader_after(row)
    lines = [f"{name} left the race, {distance(row, name)}" for name in row["left"]]
    return "; ".join([*lines, *([f"{leader} leads"] if leader else [])])


def who_trains(row: Row) -> str:
    """Which part of a run an iteration belongs to, in a few words; empty if the leader trains alone."""
    if row.get("final"):
        return "final phase"
    if row.get("racing"):
        return f"racing: {', '.join(row['racing'])}"
    return f"asked: {row['asked']}" if row.get("asked") else ""


def distance(row: Row, name: str) -> str:
    """How far an arm lay behind the best one of an iteration, in words."""
    gap, best = row["behind"][name], best_of(row)
    if gap is None or best is None:
        return "as its student was not finite"
    if gap == 0:
        return "level with the best"
    return f"{gap_in_words(gap, row['behind_se'][name])} behind {best}"


def gap_in_words(gap: float, se: float | None) -> str:
    """A difference as percentage points and standard errors: 5.8 points (9.1 standard errors)."""
    points = f"{100 * abs(gap):.1f} points"
    return f"{points} ({abs(gap) / se:.1f} standard errors)" if se else points
