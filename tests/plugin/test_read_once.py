"""A text tokenized twice in a row: read once, with the same result as read twice."""

import pytest

from dskd_plugin.host.read_once import Remembering, read_once

TEXTS = ["the red house", "the  river\n", "the red house", "the red house"]


class Counted:
    """A real backend that counts what it reads."""

    def __init__(self, backend):
        self.__dict__.update(backend=backend, readings=0)

    def encode_batch(self, *args, **options):
        self.__dict__["readings"] += 1
        return self.backend.encode_batch(*args, **options)

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def __setattr__(self, name, value):
        setattr(self.backend, name, value)


def everything(tokenizer, text, **options):
    ids = tokenizer(text, add_special_tokens=False, **options)["input_ids"]
    both = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **options)
    return ids, dict(both), both.tokens()


def test_the_same_ids_and_places_for_half_of_the_readings(tokenizer_zoo):
    tokenizer = tokenizer_zoo.byte_level()
    plain = [everything(tokenizer, text) for text in TEXTS]
    backend = tokenizer._tokenizer
    tokenizer._tokenizer = counted = Counted(backend)
    with read_once(tokenizer):
        assert [everything(tokenizer, text) for text in TEXTS] == plain
    assert counted.readings == 3 and tokenizer._tokenizer is counted


def test_other_ways_to_read_a_text_are_other_readings(tokenizer_zoo):
    tokenizer = tokenizer_zoo.mistral()
    ways = [
        {},
        {"add_special_tokens": False},
        {"truncation": True, "max_length": 2},
        {},
        {"padding": "max_length", "max_length": 9},
        {"split_special_tokens": True},
        {"text_pair": "blue"},
    ]
    tokenizer.pad_token = "</s>"
    plain = [tokenizer("red</s> house of stone", **way)["input_ids"] for way in ways]
    assert len({str(ids) for ids in plain}) == len(ways) - 2  # mistral() here puts nothing around a text
    with read_once(tokenizer):
        assert [tokenizer("red</s> house of stone", **way)["input_ids"] for way in ways] == plain
        before = tokenizer("red house of stone")["input_ids"]
        tokenizer.add_tokens(["house"])
        assert tokenizer("red house of stone")["input_ids"] != before


def test_an_error_leaves_the_tokenizer_as_it_was(tokenizer_zoo):
    tokenizer = tokenizer_zoo.byte_level()
    backend = tokenizer._tokenizer
    with pytest.raises(KeyError), read_once(tokenizer):
        assert isinstance(tokenizer._tokenizer, Remembering)
        raise KeyError
    assert tokenizer._tokenizer is backend


@pytest.mark.parametrize("name", ["mistral_slow", "qwen"])
def test_other_tokenizers_are_left_alone(tokenizer_zoo, name):
    tokenizer = getattr(tokenizer_zoo, name)()
    before = getattr(tokenizer, "_tokenizer", None)
    with read_once(tokenizer):
        assert getattr(tokenizer, "_tokenizer", None) is before
