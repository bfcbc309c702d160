"""The gate's log and its marks: what is counted, what is left out, and the policy that the marks make."""

import json
import random
import tomllib
from datetime import UTC, datetime, timedelta

import pytest

from model.genesis.gate.byte_gate import GateLog, Removal
from model.genesis.gate.interventions import (
    Damaged,
    Marks,
    policy_text,
    read_log,
    review,
    select,
    select_rule,
    toml_string,
    write_policy,
)

NAMES = ["privacy/phone", "privacy/e-mail", "iftira/şüpheli", "🔪/words"]


def entry(rule="privacy/phone", **changes):
    category, name = rule.split("/")
    values = {
        "time": "2026-01-02T03:04:05Z", "run": "a1", "row": 0, "position": 7, "category": category, "rule": name,
        "state": 12, "byte": 53, "mass": 0.25,
    }  # fmt: skip
    return values | changes


def write(path, entries, end="\n"):
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in entries]
    path.write_bytes(b"\n".join(lines) + end.encode())
    return path


def test_counts_agree_with_a_plain_recount(tmp_path):
    rng = random.Random(1)
    start = datetime(2026, 3, 1, tzinfo=UTC)
    entries, verdicts = [], []
    for i in range(500):
        time = (start + timedelta(seconds=rng.randrange(10**6))).strftime("%Y-%m-%dT%H:%M:%SZ")
        entries.append(
            entry(rng.choice(NAMES), time=time, run=f"run{rng.randrange(5)}", mass=rng.random(), byte=i % 256)
        )
        verdicts.append(rng.choice([None, "true", "false"]))
    log = write(tmp_path / "gate.jsonl", entries)
    marks = Marks(log)
    for verdict in ("true", "false"):
        marks.add([x for x, v in zip(read_log(log), verdicts) if v == verdict], verdict)

    found = review(log, Marks(log))
    assert [rule.rule_id for rule in found.rules] == sorted(NAMES) and not found.damaged and not found.stale
    for rule in found.rules:
        mine = [(e, v) for e, v in zip(entries, verdicts) if f"{e['category']}/{e['rule']}" == rule.rule_id]
        assert rule.count == len(mine) > 50
        assert rule.mass == pytest.approx(sum(e["mass"] for e, _ in mine))
        assert rule.runs == {e["run"] for e, _ in mine}
        times = sorted(e["time"] for e, _ in mine)
        assert [f"{t:%Y-%m-%dT%H:%M:%SZ}" for t in (rule.first, rule.last)] == [times[0], times[-1]]
        assert rule.marks == {kind: sum(v == kind for _, v in mine) for kind in ("false", "true")}


def test_it_reads_what_the_gate_writes(tmp_path):
    gate_log = GateLog(tmp_path / "gate.jsonl", with_text=True)
    gate_log.add(Removal(3, "privacy", "builtin:luhn", 99, 49, 0.125), 17, "kart ığ 🔪 ".encode() + b"\xff\x00")
    (each,) = read_log(gate_log.path)
    assert (each.run, each.row, each.position, each.state, each.byte) == (gate_log.run, 3, 17, 99, 49)
    assert (each.rule_id, each.mass, each.text) == ("privacy/builtin:luhn", 0.125, "kart ığ 🔪 \ufffd\x00")
    assert abs(datetime.now(UTC) - each.time) < timedelta(minutes=5)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\xfe\x00binary\x80", "not JSON"),
        (b'{"time": "2026-01-02T03:04:0', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"message": "another program"}', "run"),
        (entry(byte=256), "byte is no integer from 0 to 255"),
        (entry(byte=True), "byte"),
        (entry(row=-1), "row"),
        (entry(position=1.5), "position"),
        (entry(mass=float("nan")), "mass"),
        (entry(mass=1.5), "mass"),
        (entry(time="yesterday"), "time"),
        (entry(time="2026-01-02T03:04:05"), "time"),
        (entry(time="0001-01-01T00:00:00+23:00"), "time"),
        (entry(category=None), "category"),
        (entry(category="\ud800"), "category"),
        (entry(text=5), "text"),
    ],
)
def test_damaged_and_foreign_lines_are_named_and_the_rest_is_read(tmp_path, line, reason):
    log = write(tmp_path / "gate.jsonl", [entry(), line, b"", entry(text="kart 4111 ığ 🔪\n\0")])
    first, bad, last = read_log(log)
    assert isinstance(bad, Damaged) and bad.number == 2 and reason in bad.reason
    assert (first.number, last.number, last.text) == (1, 4, "kart 4111 ığ 🔪\n\0")


def test_empty_and_missing_logs(tmp_path):
    found = review(write(tmp_path / "empty.jsonl", []), Marks(tmp_path / "empty.jsonl"))
    assert not found.rules and not found.damaged
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ValueError, match="accepted is a readable file"):
            review(path, Marks(path))


def test_the_last_mark_holds_and_the_file_only_grows(tmp_path):
    log = write(tmp_path / "gate.jsonl", [entry(), entry(byte=54)])
    first, second = read_log(log)
    assert Marks(log).add([first, second], "false") == 2
    before = Marks(log).path.read_bytes()
    assert Marks(log).add([second], "true") == 1
    marks = Marks(log)
    assert marks.path.read_bytes().startswith(before) and len(marks.path.read_bytes().splitlines()) == 3
    assert (marks.of(first), marks.of(second)) == ("false", "true")
    with pytest.raises(ValueError, match="accepted are false and true"):
        marks.add([first], "maybe")


def test_a_mark_does_not_pass_to_another_line(tmp_path):
    log = write(tmp_path / "gate.jsonl", [entry(), entry(byte=54)])
    Marks(log).add(read_log(log), "false")
    write(log, [entry(run="new"), entry(byte=54)])  # rotated: the second line happens to be the same
    found = review(log, Marks(log))
    assert found.stale == 1 and found.rules[0].marks == {"false": 1, "true": 0}
    # The old log, put back, has its marks.
    write(log, [entry(), entry(byte=54)], end="")
    assert review(log, Marks(log)).rules[0].marks["false"] == 2


def test_damaged_marks_are_named_and_a_cut_line_spoils_no_other(tmp_path):
    log = write(tmp_path / "gate.jsonl", [entry(), entry(byte=54)])
    first, second = read_log(log)
    Marks(log).add([first], "true")
    path = Marks(log).path
    path.write_bytes(path.read_bytes() + b'{"line": 2, "ha')  # a writer was killed here
    Marks(log).add([second], "false")
    path.write_bytes(path.read_bytes() + b'{"line": 2, "hash": "x", "mark": "perhaps"}\n')
    marks = Marks(log)
    assert (marks.of(first), marks.of(second)) == ("true", "false")
    assert [each.number for each in marks.damaged] == [2, 4]


def test_selecting_by_number(tmp_path):
    log = write(tmp_path / "gate.jsonl", [entry(byte=i) if i != 3 else b"damaged" for i in range(1, 11)])
    assert [each.number for each in select(log, "9, 2-5,2,10")] == [2, 4, 5, 9, 10]
    for wrong in ("3", "11", "8-11", "0", "5-4", "1-10000000000", "9" * 5000):
        with pytest.raises(ValueError, match="names no intervention"):
            select(log, wrong)
    for wrong in ("", "x", "1-", "-1", "1,,2", "1.5", "²", "1-2-3"):
        with pytest.raises(ValueError, match="is no number"):
            select(log, wrong)


def test_selecting_by_rule(tmp_path):
    log = write(
        tmp_path / "gate.jsonl", [entry("privacy/phone"), entry("work/phone"), entry("privacy/iban"), b"damaged"]
    )
    assert [each.number for each in select_rule(log, "work/phone")] == [2]
    assert [each.number for each in select_rule(log, "iban")] == [3]
    with pytest.raises(ValueError, match=r"several rules .*accepted are privacy/phone, work/phone"):
        select_rule(log, "phone")
    with pytest.raises(ValueError, match=r"no rule .*accepted are privacy/iban, privacy/phone, work/phone"):
        select_rule(log, "privacy")
    with pytest.raises(ValueError, match="it has none"):
        select_rule(write(tmp_path / "empty.jsonl", []), "phone")


def test_a_wrong_rule_has_enough_marks_and_enough_of_them_false(tmp_path):
    log = write(tmp_path / "gate.jsonl", [entry(byte=i) for i in range(6)])
    (rule,) = review(log, Marks(log)).rules
    for false, true, wrong in ((2, 0, False), (3, 0, True), (2, 1, True), (2, 2, True), (2, 3, False), (0, 6, False)):
        rule.marks = {"false": false, "true": true}
        assert rule.is_wrong(0.5, 3) is wrong


def test_toml_round_trip(tmp_path):
    odd = [
        "",
        'a"b\\c',
        "çğıİöşü 🔪",
        "".join(map(chr, range(0x20))),
        "\x7f\x85\u2028",
        "line\n# disabled = []",
        "'''\"\"\"",
    ]
    for text in odd:
        assert tomllib.loads(f"x = {toml_string(text)}  # {toml_string(text)}")["x"] == text
    log = write(tmp_path / "gate.jsonl", [entry() | {"rule": text} for text in odd])
    rules = review(log, Marks(log)).rules
    values = tomllib.loads(policy_text("ana politika.toml", rules))
    assert values == {"extends": "ana politika.toml", "disabled": [rule.rule_id for rule in rules]}
    out = write_policy(tmp_path / "new" / "policy.toml", "default", rules)
    assert tomllib.loads(out.read_text("utf-8"))["disabled"] == values["disabled"]
    with pytest.raises(ValueError, match="accepted is a new one"):
        write_policy(out, "default", rules)
