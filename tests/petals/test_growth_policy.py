"""The growth policy against tables, closed forms and brute force; the Poisson estimate against simulation."""

import json
import math
import random
import statistics

import pytest

from model.petals.growth import FreezingProcess, GrowthPolicy, new_petals, regularised_beta, student_t_quantile

# Published tables, to their four digits.
TABLE = [
    (0.95, 1, 6.3138),
    (0.975, 1, 12.7062),
    (0.95, 2, 2.9200),
    (0.99, 2, 6.9646),
    (0.99, 5, 3.3649),
    (0.995, 5, 4.0321),
    (0.95, 10, 1.8125),
    (0.90, 20, 1.3253),
    (0.975, 30, 2.0423),
    (0.95, 60, 1.6706),
    (0.95, 120, 1.6577),
    (0.95, math.inf, 1.6449),
    (0.975, math.inf, 1.9600),
]


@pytest.mark.parametrize("p, degrees, value", TABLE)
def test_quantiles_are_the_tables(p, degrees, value):
    assert student_t_quantile(p, degrees) == pytest.approx(value, abs=5.01e-5)


@pytest.mark.parametrize("p", [1e-9, 1e-3, 0.1, 0.3, 0.4999, 0.5, 0.6, 0.74, 0.76, 0.95, 0.999, 1 - 1e-9])
def test_quantiles_have_closed_forms_at_1_2_and_4(p):
    tail = min(p, 1 - p)
    sign = math.copysign(1, p - 0.5)
    assert student_t_quantile(p, 1) == pytest.approx(sign / math.tan(math.pi * tail), rel=1e-9, abs=1e-9)
    alpha = 4 * p * (1 - p)
    assert student_t_quantile(p, 2) == pytest.approx((2 * p - 1) * math.sqrt(2 / alpha), rel=1e-9, abs=1e-9)
    q = math.cos(math.acos(math.sqrt(alpha)) / 3) / math.sqrt(alpha)
    assert student_t_quantile(p, 4) == pytest.approx(sign * 2 * math.sqrt(max(0.0, q - 1)), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("degrees", [3, 7.5, 47, 999, 1001, 2500])
def test_quantiles_invert_the_integral_of_the_density(degrees):
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)

    def density(t):
        return scale * (1 + t * t / degrees) ** (-(degrees + 1) / 2)

    for p in (0.55, 0.8, 0.95, 0.995):
        t, n = student_t_quantile(p, degrees), 2000
        simpson = sum(density(t * i / n) * (1 if i in (0, n) else 4 if i % 2 else 2) for i in range(n + 1))
        assert 0.5 + simpson * t / n / 3 == pytest.approx(p, abs=1e-9)
        assert student_t_quantile(1 - p, degrees) == pytest.approx(-t, rel=1e-9)


def test_many_degrees_are_nearly_normal():
    assert student_t_quantile(0.95, 1e7) == pytest.approx(student_t_quantile(0.95, math.inf), abs=1e-6)


@pytest.mark.parametrize("x", [0.0, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0])
def test_regularised_beta_has_closed_forms(x):
    assert regularised_beta(1, 7, x, 1 - x) == pytest.approx(1 - (1 - x) ** 7, abs=1e-13)
    # P(at least 3 of 6 coins show heads).
    heads = sum(math.comb(6, k) * x**k * (1 - x) ** (6 - k) for k in range(3, 7))
    assert regularised_beta(3, 4, x, 1 - x) == pytest.approx(heads, abs=1e-13)


@pytest.mark.parametrize("p, degrees", [(0, 3), (1, 3), (-0.1, 3), (math.nan, 3), (0.9, 0), (0.9, -1), (0.9, math.nan)])
def test_quantiles_refuse_what_is_none(p, degrees):
    with pytest.raises(ValueError, match="accepted is a number"):
        student_t_quantile(p, degrees)


def test_the_bound_is_the_textbook_formula():
    """Against the standard library's mean and standard deviation and the table's t."""
    fluid = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    expected = statistics.mean(fluid) + 1.8125 * statistics.stdev(fluid) / math.sqrt(11)
    assert GrowthPolicy().upper_bound(10, 11) == pytest.approx(expected, abs=1e-5)
    # 0.256 < 1/e; with two fluid petals it is 0.403.
    assert GrowthPolicy().decide(fluid)
    assert not GrowthPolicy().decide([1, *fluid[:-1]])
    # A bound that asks for less confidence is lower.
    assert GrowthPolicy(confidence=0.9).upper_bound(9, 11) < GrowthPolicy().upper_bound(9, 11)


@pytest.mark.parametrize("total, least, most", [(48, 0.02, 0.09), (400, 0.03, 0.07)])
def test_at_a_true_share_of_1_over_e_it_expands_about_as_rarely_as_it_says(total, least, most):
    """The chance of a false alarm, summed over the binomial distribution; 5% is asked for."""
    policy = GrowthPolicy()
    p = 1 / math.e
    false_alarm = sum(
        math.comb(total, k) * p**k * (1 - p) ** (total - k)
        for k in range(total + 1)
        if policy.decide([1] * k + [0] * (total - k))
    )
    assert least < false_alarm < most


def test_few_petals():
    for total in (0, 1):
        assert not GrowthPolicy().decide([0] * total), "no variance"
    assert GrowthPolicy().decide([0, 0]), "all solid, and two of them agree"
    assert not GrowthPolicy().decide([1, 0])
    phi = GrowthPolicy("phi")
    assert not phi.decide([]) and phi.decide([0]) and not phi.decide([1])


def test_phi_has_to_be_passed():
    policy = GrowthPolicy("phi", phi=0.8)
    assert not policy.decide([0] * 4 + [1]) and not policy.decide([0] * 12 + [1] * 3)
    assert policy.decide([0] * 9 + [1])
    assert GrowthPolicy("phi", phi=0.5).decide([0, 0, 1])


@pytest.mark.parametrize(
    "policy",
    [GrowthPolicy(), GrowthPolicy(confidence=0.5), GrowthPolicy(confidence=0.999), GrowthPolicy("phi")],
)
def test_what_is_needed_is_what_the_policy_decides(policy):
    for total in range(41):
        decisions = [policy.decide([0] * solid + [1] * (total - solid)) for solid in range(total + 1)]
        assert decisions == sorted(decisions), "it never takes a yes back when one more petal sets"
        assert policy.solid_needed(total) == (decisions.index(True) if True in decisions else None)


def test_new_petals_are_half_as_many_rounded_up():
    assert [new_petals(n) for n in (1, 2, 3, 8, 9)] == [1, 1, 2, 4, 5]
    with pytest.raises(ValueError, match="total=0"):
        new_petals(0)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"rule": "often"}, "rule='often': accepted are student-t, phi"),
        ({"phi": 1.0}, "phi=1.0"),
        ({"phi": True}, "phi=True"),
        ({"confidence": 0.4}, "confidence=0.4: accepted is a number from 0.5 to under 1"),
        ({"confidence": "high"}, "confidence='high'"),
    ],
)
def test_policies_refuse_what_they_do_not_know(arguments, text):
    with pytest.raises(ValueError, match=text):
        GrowthPolicy(**arguments)


def test_decide_refuses_what_is_not_a_status():
    with pytest.raises(ValueError, match="accepted are 0"):
        GrowthPolicy().decide([0, 2, 1])


# ── freezing as a Poisson process ────────────────────────────────────────────────────────────────────────────────────

TOTAL, NEEDED = 48, 5
SOLID = GrowthPolicy().solid_needed(TOTAL) - NEEDED


def test_expected_steps_by_hand():
    policy = GrowthPolicy("phi", phi=0.8)  # 9 of 10
    process = FreezingProcess()
    assert process.rate is None and process.steps_until(policy, 0, 10) is None
    process.record(100, 0)
    assert process.steps_until(policy, 0, 10) is None, "nothing has set yet"
    process.record(150, 2)
    process.record(300, 1)
    assert process.rate == 0.01
    assert process.steps_until(policy, 3, 10) == 600
    assert process.steps_until(policy, 9, 10) == 0.0
    assert process.steps_until(GrowthPolicy(), 1, 1) is None, "one petal never suffices"
    process.expanded(300)
    assert process.rate is None
    process.record(400, 4)
    assert process.rate == 0.04


def arrivals(rate, generator):
    """The times of a Poisson process, by its exponential gaps."""
    now = 0.0
    while True:
        now += generator.expovariate(rate)
        yield now


def test_the_estimate_is_the_mean_waiting_time_of_simulated_processes():
    """Rate and waiting time of 1000 processes of about 60 events. The bounds are four standard errors; 1 / rate is
    biased by one part in 60 of its own."""
    generator, rate, steps, runs = random.Random(3), 0.03, 2000, 1000
    rates, estimates, waits = [], [], []
    for _ in range(runs):
        times = arrivals(rate, generator)
        seen, after = 0, next(times)
        process = FreezingProcess()
        for step in range(100, steps + 1, 100):
            before = seen
            while after <= step:
                seen, after = seen + 1, next(times)
            process.record(step, seen - before)
        rates.append(process.rate)
        estimates.append(process.steps_until(GrowthPolicy(), SOLID, TOTAL))
        for _ in range(NEEDED - 1):
            after = next(times)
        waits.append(after - steps)
    events = rate * steps
    assert statistics.mean(rates) == pytest.approx(rate, rel=4 / math.sqrt(events * runs))
    error = 4 * math.sqrt(1 / NEEDED + 1 / events) / math.sqrt(runs)
    assert statistics.mean(estimates) == pytest.approx(statistics.mean(waits), rel=error + 1 / events)


def test_the_interval_holds_the_waiting_time_as_often_as_it_says():
    """1500 processes seen until their eighth event, where the interval is exact; four standard errors."""
    generator, runs, inside = random.Random(5), 1500, 0
    for _ in range(runs):
        times = arrivals(1e-4, generator)
        seen = [next(times) for _ in range(8)][-1]
        wait = [next(times) for _ in range(NEEDED)][-1] - seen
        process = FreezingProcess()
        process.record(round(seen), 8)
        low, high = process.interval(GrowthPolicy(), SOLID, TOTAL, coverage=0.8)
        inside += low <= wait <= high
    assert inside / runs == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / runs))


def test_the_interval_is_a_gamma_time_at_a_gamma_rate():
    """Its ends against the quantiles of 100 000 draws."""
    generator = random.Random(7)
    process = FreezingProcess()
    process.record(1000, 6)
    draws = sorted(generator.gammavariate(NEEDED, 1) / generator.gammavariate(6, 1 / 1000) for _ in range(100_000))
    low, high = process.interval(GrowthPolicy(), SOLID, TOTAL)
    assert low == pytest.approx(draws[5_000], rel=0.03)
    assert high == pytest.approx(draws[95_000], rel=0.03)
    assert low < process.steps_until(GrowthPolicy(), SOLID, TOTAL) < high
    assert process.interval(GrowthPolicy(), TOTAL, TOTAL) == (0.0, 0.0)
    assert FreezingProcess().interval(GrowthPolicy(), SOLID, TOTAL) is None
    with pytest.raises(ValueError, match="coverage=1"):
        process.interval(GrowthPolicy(), SOLID, TOTAL, coverage=1)


def test_the_process_goes_round_as_json_and_goes_on():
    process = FreezingProcess()
    process.record(50, 1)
    process.expanded(60)
    process.record(90, 3)
    again = FreezingProcess.from_dict(json.loads(json.dumps(process.to_dict())))
    assert again == process
    for each in (process, again):
        each.record(100, 1)
    assert again.rate == process.rate == 0.1


def test_the_process_refuses_to_go_back():
    process = FreezingProcess()
    process.record(50, 1)
    with pytest.raises(ValueError, match="step=49: accepted is an integer ≥ 50"):
        process.record(49, 0)
    with pytest.raises(ValueError, match="events=-1"):
        process.record(60, -1)
    with pytest.raises(ValueError, match="step=10"):
        process.expanded(10)
    for broken in ({"start": 0}, {"start": 5, "step": 3, "events": 0}, {"start": 0, "step": 3, "events": -1}):
        with pytest.raises(ValueError, match="accepted"):
            FreezingProcess.from_dict(broken)
    with pytest.raises(ValueError, match="solid=5: accepted is at most total = 4"):
        process.steps_until(GrowthPolicy(), 5, 4)
