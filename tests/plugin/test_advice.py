"""The lines that a run says of itself."""

import pytest

from dskd_plugin import advice
from dskd_plugin.args import parse_settings


def settings(**changes):
    return parse_settings({"teacher": {"model": "org/teacher"}, **changes})


@pytest.mark.parametrize(
    ("changes", "one_tokenizer", "said"),
    [({}, True, True), ({}, False, False), ({"method": "kd"}, True, False)],
)
def test_kd_where_the_tokenizers_are_one(changes, one_tokenizer, said):
    text = advice.on_method(settings(**changes), one_tokenizer=one_tokenizer)
    assert ("method: kd" in text) if said else text is None


@pytest.mark.parametrize(("agreement", "warmup_steps", "said"), [(0.08, 0, True), (0.08, 5, False), (0.25, 0, False)])
def test_warm_up_where_agreement_begins_low(agreement, warmup_steps, said):
    text = advice.on_agreement(settings(projector={"warmup_steps": warmup_steps}), agreement)
    assert ("8%" in text and "warmup_steps: 30" in text) if said else text is None
    if said:  # what it says to write is a setting
        found = settings(projector={"learning_rate": 5e-3, "warmup_steps": 30})
        assert advice.on_agreement(found, agreement) is None
