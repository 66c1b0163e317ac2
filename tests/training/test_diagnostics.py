"""When a run is told that its chosen completions fall, by numbers a reader can follow."""

from dpo_ds.training.tracking import WINDOW, ChosenFalls


def line(step: int, chosen: float, reward: float = 0.0) -> dict:
    return {"step": step, "logps/chosen": chosen, "rewards/chosen": reward}


def said(watch: ChosenFalls, lines) -> list[str]:
    return [text for text in map(watch.observe, lines) if text]


def test_a_fall_of_a_tenth_below_the_reference_is_said_once():
    # reward -1.1 at beta 0.1 is 11 nats below the reference: -100 there, -111 here
    lines = [line(step, -111.0, -1.1) for step in range(1, 3 * WINDOW)]
    (text,) = said(ChosenFalls(0.1, has_reference=True), lines)
    assert f"step {WINDOW}: chosen completions have fallen to a log-prob of -111.0, -100.0 under the reference" in text
    assert "--loss.sft_weight" in text


def test_a_smaller_fall_or_hard_pairs_are_nothing_to_say():
    assert not said(ChosenFalls(0.1, has_reference=True), [line(step, -109.0, -0.9) for step in range(1, 60)])
    assert not said(ChosenFalls(0.1, has_reference=True), [line(step, -5.0 * step) for step in range(1, 60)])


def test_without_a_reference_the_start_is_the_measure():
    steady = [line(step, -100.0) for step in range(1, WINDOW + 1)]
    fallen = [line(step, -120.0) for step in range(WINDOW + 1, 3 * WINDOW)]
    (text,) = said(ChosenFalls(0.1, has_reference=False), steady + fallen)
    # after ten of the lower ones the window's mean is -110
    assert text.startswith(f"step {WINDOW + 10}: ") and "-110.0, -100.0 at the start" in text
