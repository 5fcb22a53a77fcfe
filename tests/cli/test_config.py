"""Defaults are valid and survive config.toml; every rule refuses what breaks it."""

import dataclasses
import math
import tomllib

import pytest
import tomli_w

from ev3_distill.config import EV3, Budget, Compress, Fractions, Teach
from ev3_distill.config_file import OLDER_EV3, read_config, read_finished_config, read_run_config
from ev3_distill.errors import InputError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2000", Budget(steps=2000)),
        ("1e3", Budget(steps=1000)),
        ("10e", Budget(epochs=10)),
        ("0.5e", Budget(epochs=0.5)),
        ("90s", Budget(seconds=90)),
        ("1.5m", Budget(seconds=90)),
        ("2h", Budget(seconds=7200)),
    ],
)
def test_budgets_are_parsed(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    "text", ["", "e", "0", "-1", "0s", "1.5", "nan", "inf", "-inf", "1d", "2 weeks", "1e300", str(2**30)]
)
def test_bad_budgets_are_refused(text):
    with pytest.raises(InputError, match=r"a budget must be a positive number of steps .*; got '.*': try 2000"):
        Budget.parse(text)


def test_budgets_convert_to_steps():
    assert Budget(steps=7).in_steps(1000, 128) == 7
    assert Budget(seconds=7).in_steps(1000, 128) is None
    assert Budget(epochs=10).in_steps(1280, 128) == 100
    assert Budget(epochs=0.001).in_steps(1280, 128) == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda: EV3(batch_size=0),
        lambda: EV3(eval_batch_size=0),
        lambda: EV3(length=0),
        lambda: EV3(length=10, max_length=9),
        lambda: EV3(race=-0.1),
        lambda: EV3(race=0.51),
        lambda: EV3(race=math.nan),
        lambda: EV3(drop=0),
        lambda: EV3(drop=math.nan),
        lambda: EV3(final=-0.1),
        lambda: EV3(final=1.0),
        lambda: EV3(final=math.nan),
        lambda: EV3(delta=0),
        lambda: EV3(delta=1),
        lambda: EV3(roll_back=0.5),
        lambda: Fractions(explore=0.4),
        lambda: Fractions(explore=0.7, test=0),
        lambda: Fractions(explore=math.nan),
        lambda: Compress(seed=-1),
        lambda: Compress(seed=2**31),
        lambda: Compress(confidence=1),
        lambda: Compress(confidence=math.nan),
        lambda: Compress(checkpoint_s=-1),
        lambda: Compress(budget="x"),
        lambda: Compress(teacher_budget="x"),
        lambda: Compress(deliver="last"),
        lambda: Teach(seed=-1),
        lambda: Teach(budget="x"),
    ],
)
def test_every_rule_is_enforced(build):
    with pytest.raises(InputError, match=r".+; got .+: .+"):
        build()


CHANGED = (
    Compress(),
    Teach(),
    Compress(arms=("ce",), seed=3, checkpoint_s=0.0, ev3=EV3(delta=0.1), splits=Fractions(0.4, 0.2, 0.2, 0.2)),
    Teach(budget="10e", ev3=EV3(length=7)),
)


@pytest.mark.parametrize("config", CHANGED)
def test_a_configuration_survives_its_file(config, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(dataclasses.asdict(config)))
    assert read_config(type(config), path) == config
    content = tomllib.loads(path.read_text())
    assert set(content) == {field.name for field in dataclasses.fields(config)}


def test_missing_keys_keep_their_defaults(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("checkpoint_s = 2\narms = ['ce']\n[ev3]\ndelta = 0.1\n")
    assert read_config(Compress, path) == Compress(checkpoint_s=2.0, arms=("ce",), ev3=EV3(delta=0.1))


def test_every_option_has_a_help_text():
    """tyro shows the docstring below a field as its help text; every class in the hierarchy may hold it."""
    import inspect

    for kind in (EV3, Fractions, Compress, Teach):
        sources = [inspect.getsource(base) for base in kind.__mro__ if dataclasses.is_dataclass(base)]
        lines = [line.strip() for source in sources for line in source.splitlines()]
        for field in dataclasses.fields(kind):
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}:"))
            assert lines[at + 1].startswith('"""'), field.name


def test_runs_of_older_versions_take_raw_inputs(tmp_path):
    (tmp_path / "config.toml").write_text('budget = "9"\n')
    assert not read_run_config(Compress, tmp_path).standardize
    assert read_config(Compress, tmp_path / "config.toml").standardize
    (tmp_path / "config.toml").write_text("standardize = true\n")
    assert read_run_config(Compress, tmp_path).standardize


def test_runs_whose_arms_competed_by_other_rules_are_read_but_not_resumed(tmp_path):
    (tmp_path / "config.toml").write_text("[ev3]\nlength = 7\nmax_share = 0.2\nexploration = 0.2\ntakeover = 1.0\n")
    assert read_finished_config(Compress, tmp_path).ev3 == EV3(length=7)
    with pytest.raises(
        InputError,
        match=r"of an older version, whose \[ev3\] has exploration, max_share, takeover: finish it with that",
    ):
        read_run_config(Compress, tmp_path)
    with pytest.raises(InputError, match="got 'max_share' in"):  # a configuration of the user's own has a key too many
        read_config(Compress, tmp_path / "config.toml")
    assert not {*OLDER_EV3} & {field.name for field in dataclasses.fields(EV3)}
