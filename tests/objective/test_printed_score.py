"""The score in the output of a command: the number that was meant, or an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptavg.errors import TaskError
from ckptavg.objective.printed_score import read_score

BAR = "10%|#         | 1/10 [00:01]\r100%|##########| 10/10 [00:09]\r"


@pytest.mark.parametrize(
    ("output", "number", "source"),
    [
        ("acc 0.75\n", 0.75, "acc 0.75"),  # the only number may be anywhere
        ("the accuracy is 0.75. done\n", 0.75, "the accuracy is 0.75. done"),
        ("step 3 of 9\n0.5\n\n", 0.5, "0.5"),  # of several, the last line has one alone
        ("step 3 of 9\n  val/acc@5 = 1e-3 \n", 1e-3, "val/acc@5 = 1e-3"),
        ("step 3 of 9\ntop-5 accuracy (macro): .5\n", 0.5, "top-5 accuracy (macro): .5"),
        ("took 3 s\naccuracy=91.2%\n", 91.2, "accuracy=91.2%"),
        ("took 3 s\nloss: \u22120.5", -0.5, "loss: -0.5"),  # the sign of minus
        (f"{BAR}\n0.5\n", 0.5, "0.5"),
        (f"{BAR}0.5\n", 0.5, "0.5"),
        ("epoch 3\n\x1b[1;32m0.5\x1b[0m\n", 0.5, "0.5"),
        ("3\nscore: NaN", float("nan"), "score: NaN"),
        ("3\n-Infinity", float("-inf"), "-Infinity"),
        ("gpt2 v1.2.3 12ms 0x1F scores -4", -4, "gpt2 v1.2.3 12ms 0x1F scores -4"),
        ('n 8\n{"accuracy": 0.5, "ok": true, "name": "3"}\n', 0.5, "accuracy=0.5"),
        ('n 8\n{\n  "results": {"acc": 1}\n}\n', 1, "results.acc=1.0"),
        ('{"acc": 1, "n": 8}\nscore: 2', 2, "score: 2"),
    ],
)
def test_the_number_that_is_meant_is_read_and_its_place_shown(output: str, number: float, source: str):
    score = read_score(output)
    assert score is not None and (repr(score.number), score.text) == (repr(float(number)), source)


@pytest.mark.parametrize("output", ["", "none", "-", "n/a", "12ms", '{"acc": null}', '{"ok": true}', "1_000 x"])
def test_an_output_without_a_number_has_no_score(output: str):
    assert read_score(output) is None and read_score(output, "acc") is None


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("score=0.5 in 12 s", "several numbers, and not one alone on the last line: score=0.5 in 12 s"),
        ("accuracy: 0.5\ndone in 12 s", "not one alone on the last line: done in 12 s"),
        ("epoch 3: 0.5\n", "not one alone on the last line: epoch 3: 0.5"),
        ("loss=0.3 accuracy=0.9", "several numbers"),
        ("0,91", "several numbers"),  # a decimal comma
        ("1,234.5", "several numbers"),  # thousands
        ("0.91 +- 0.01", "several numbers"),
        (f"0.5\n{BAR}", "several numbers"),
        ("{'acc': 0.9, 'n': 8}", "several numbers"),
        ("[0.1, 0.2]", "several numbers"),
        ('{"n": 8, "accuracy": 0.9, "loss": {"val": 1}}', "a JSON object with several numbers: n, accuracy, loss.val"),
        ('log 1\n{\n"n": 8,\n"accuracy": NaN\n}', "a JSON object with several numbers: n, accuracy"),
    ],
)
def test_an_output_in_which_several_numbers_could_be_meant_is_refused(output: str, message: str):
    with pytest.raises(TaskError) as caught:
        read_score(output)
    assert message in str(caught.value) and caught.value.hint and "\n" not in str(caught.value)


def test_a_key_chooses_the_last_json_object_that_has_a_number_there():
    objects = ['{"a": {"b": 1}}', '{"a.b": 2}', "[1]", '{"a": {"b": true}}', '{"a": 5}', "{bad", '{"a": {"b": 7}} x']
    score = read_score("\n".join(["log 3", *objects]), "a.b")
    assert score == (2.0, "a.b=2.0")
    pretty = read_score('{\n "a": {\n  "b": 3,\n  "n": 9\n }\n}\ndone in 4 s\n', "a.b")
    assert pretty == (3.0, "a.b=3.0")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_printed_by_python_is_read_exactly(value: float):
    for output in (f"8 examples\nscore: {value!r}\n", f"the score {value!r}\n", f'{{"score": {value!r}}}'):
        score = read_score(output)
        assert score is not None and score.number == value


@given(st.text(max_size=60))
def test_any_output_has_a_score_or_none_or_is_refused(output: str):
    try:
        score = read_score(output)
    except TaskError:
        return
    assert score is None or isinstance(score.number, float)
