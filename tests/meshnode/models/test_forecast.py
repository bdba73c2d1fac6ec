"""How long it will go on, from what came in the last seconds."""

from __future__ import annotations

from meshnode.models.forecast import Forecast, Outlook

MIB = 1 << 20


def seen(forecast: Forecast, *steps: tuple[float, int], total: int = 1000 * MIB) -> Outlook:
    """After these steps: when, and how many MiB were there."""
    outlooks = [forecast.take(done * MIB, total, at) for at, done in steps]
    return outlooks[-1]


def test_the_speed_of_the_last_seconds_says_how_long_it_will_go_on() -> None:
    steady = seen(Forecast(), *((at, 10 * at) for at in range(21)))
    assert (steady.bytes_per_s, steady.eta_s) == (10 * MIB, 80.0)
    assert str(steady) == "200.0 MiB of 1000.0 MiB (20 %), 10.0 MiB/s, 1 min left"


def test_a_fast_start_is_forgotten() -> None:
    fast = [(float(at), 50 * at) for at in range(11)]
    slow = [(10.0 + at, 500 + at) for at in range(1, 16)]
    assert seen(Forecast(), *fast, *slow).bytes_per_s == MIB


def test_in_the_first_second_nothing_is_said_of_a_speed() -> None:
    first = seen(Forecast(), (0.0, 0), (0.9, 100))
    assert (first.bytes_per_s, first.eta_s) == (None, None)
    assert str(first) == "100.0 MiB of 1000.0 MiB (10 %)"


def test_where_nothing_comes_the_end_is_not_known() -> None:
    stalled = seen(Forecast(), (0.0, 100), (5.0, 100), (20.0, 100))
    assert (stalled.bytes_per_s, stalled.eta_s) == (0.0, None)
    assert str(stalled) == "100.0 MiB of 1000.0 MiB (10 %), 0 B/s"


def test_what_is_all_there_takes_no_longer() -> None:
    assert seen(Forecast(), (0.0, 0), (10.0, 1000)).eta_s == 0.0


def test_work_that_begins_anew_is_looked_at_anew() -> None:
    forecast = Forecast()
    seen(forecast, *((at, 100 * at) for at in range(10)))
    again = seen(forecast, (10.0, 0), (12.0, 2))
    assert (again.bytes_per_s, again.eta_s) == (MIB, 998.0)


def test_a_size_that_is_not_known_is_no_trouble() -> None:
    assert str(Forecast().take(0, 0, 0.0)) == "0 B of 0 B"
