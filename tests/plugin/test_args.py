"""The schema of the block: defaults, bounds, suggestions, and no setting that is accepted and ignored."""

import pytest
from pydantic import ValidationError

from dskd_plugin.settings import DSKDArgs, parse_settings

TEACHER = {"teacher": {"model": "some/teacher"}}

# (block, what the message says)
BAD = [
    ({}, ["dskd.teacher: expected a value, got nothing"]),
    (None, ["dskd: expected a block of settings, got None"]),
    ({"teacher": "some/teacher"}, ["dskd.teacher: expected a block", "Write teacher: {model: some/teacher}."]),
    ({**TEACHER, "divergence": "js"}, ["dskd.divergence: expected a block", "Write divergence: {kind: js}."]),
    (
        {**TEACHER, "on_policy": True},
        ["dskd.on_policy: expected a block", "got True. Write on_policy: {fraction: ...}."],
    ),
    ({**TEACHER, "divergence": {"skew": 0.2}}, ["dskd.divergence.kind: expected one of", "got nothing"]),
    ({"model": "some/teacher"}, ["dskd.model", "Write it where it belongs: teacher: {model: ...}."]),
    ({"teacher_model": "some/teacher"}, ["dskd.teacher_model", "teacher: {model: ...}"]),
    ({**TEACHER, "top_k": 5}, ["dskd.top_k", "xtoken: {top_k: ...} or on_policy: {top_k: ...}"]),
    ({**TEACHER, "projector": {"target": "exact"}}, ["dskd.projector.target", "target: ... right below dskd:"]),
    ({"teacher": {"model": "x", "cache": True}}, ["dskd.teacher.cache: expected a text (folder, auto), got True"]),
    ({"teacher": {"model": "x", "chat_template_kwargs": {5: True}}}, ["dskd.teacher.chat_template_kwargs.5", "a text"]),
    ({**TEACHER, "temperature": "hot"}, ["dskd.temperature: expected a number, got 'hot'"]),
    ({**TEACHER, "method": "GOLD"}, ["dskd.method", "Did you mean 'gold'?"]),
    ({**TEACHER, "method": "SeqKD"}, ["dskd.method", "got 'SeqKD'", "dskd generate RECIPE --plain-recipe"]),
    (
        {**TEACHER, "method": "uld", "impl": "fused"},
        ["dskd.impl: expected 'blocks' or 'auto' beside method: uld", "methods sft, kd, overlap_kd, mined, dskd"],
    ),
    (
        {**TEACHER, "divergence": {"kind": "adaptive_kl"}, "impl": "fused"},
        ["dskd.impl", "divergences forward_kl, reverse_kl, js,", "impl: auto"],
    ),
    ({**TEACHER, "method": "overlap_kd", "shared": "ids", "support": 8, "impl": "fused"}, ["dskd.impl", "support"]),
    ({**TEACHER, "impl": "triton"}, ["dskd.impl: expected 'auto', 'blocks' or 'fused', got 'triton'"]),
    ({**TEACHER, "kd_ratio": 1.5}, ["dskd.kd_ratio: expected less than or equal to 1, got 1.5"]),
    ({**TEACHER, "kd_ratio": 0}, ["dskd.kd_ratio: expected greater than 0, got 0"]),
    ({**TEACHER, "temperature": -2.0}, ["dskd.temperature: expected greater than 0, got -2.0"]),
    ({**TEACHER, "temperature": float("nan")}, ["dskd.temperature: expected"]),
    ({**TEACHER, "temprature": 2.0}, ["dskd.temprature", "Did you mean 'temperature'?"]),
    ({"teacher": {"model": "x", "dtyp": "float32"}}, ["dskd.teacher.dtyp", "Did you mean 'dtype'?"]),
    (
        {"teacher": {"model": "x", "sequence_len": 0}},
        ["dskd.teacher.sequence_len: expected greater than or equal to 8"],
    ),
    (
        {**TEACHER, "divergence": {"kind": "forwardkl"}},
        ["dskd.divergence.kind", "Did you mean 'forward_kl'?"],
    ),
    (
        {**TEACHER, "divergence": {"kind": "forward_kl", "skew": 0.2}},
        ["dskd.divergence.skew", "unknown setting", "set kind: skewed_forward_kl or skewed_reverse_kl"],
    ),
    (
        {**TEACHER, "divergence": {"kind": "js", "teacher_share": 1}},
        ["dskd.divergence.teacher_share: expected less than 1"],
    ),
    ({**TEACHER, "alignment": "etaa"}, ["dskd.alignment", "Did you mean 'eta'?"]),
    (
        {**TEACHER, "projector": {"top_vocab": 0}},
        ["dskd.projector.top_vocab: expected greater than or equal to 1, got 0"],
    ),
    ({**TEACHER, "spaces": "teacher", "agreement_mask": True}, ["agreement_mask", "spaces: teacher ignores"]),
    (
        {**TEACHER, "spaces": "teacher", "projector": {"learning_rate": 0.1}},
        ["projector.learning_rate", "ignores"],
    ),
    (
        {**TEACHER, "target": "projected", "spaces": "student", "unmapped_argmax": "drop"},
        ["unmapped_argmax", "ignores"],
    ),
    ({**TEACHER, "spaces": "both", "unmapped_argmax": "drop"}, ["unmapped_argmax", "target: exact"]),
    ({**TEACHER, "target": "projected", "shared": "ids"}, ["shared", "target: projected"]),
    ({**TEACHER, "target": "projected", "guard": True}, ["dskd.guard", "without target: exact"]),
    ({**TEACHER, "spaces": "teacher", "guard": False}, ["guard", "spaces: teacher ignores"]),
    ({**TEACHER, "unpaired": "share", "guard": False}, ["dskd.guard", "without unpaired: ce"]),
    ({**TEACHER, "on_policy": {"fraction": 1}, "guard": True}, ["dskd.guard", "without unpaired: ce"]),
    ({**TEACHER, "method": "overlap_kd", "guard": True}, ["guard", "method: overlap_kd ignores"]),
    ({**TEACHER, "alignment": "cma", "guard": False}, ["guard", "alignment: cma ignores"]),
    ({**TEACHER, "spaces": "teacher", "target": "exact"}, ["target", "spaces: teacher ignores"]),
    ({**TEACHER, "method": "kd", "shared": "ids"}, ["shared", "method: kd ignores"]),
    ({**TEACHER, "method": "overlap_kd", "target": "exact"}, ["target", "method: overlap_kd ignores"]),
    ({**TEACHER, "alignment": "cma", "target": "exact"}, ["target", "expected 'projected' beside alignment: cma"]),
    ({**TEACHER, "alignment": "cma", "projector": {"init": "fitted"}}, ["projector.init", "alignment: cma"]),
    ({**TEACHER, "spaces": "teacher", "projector": {"init": "fitted"}}, ["projector.init", "spaces: teacher"]),
    (
        {**TEACHER, "spaces": "student", "projector": {"init": "random", "top_vocab": 9}},
        ["projector.top_vocab", "init: random ignores"],
    ),
    ({**TEACHER, "method": "uld", "spaces": "both"}, ["spaces", "method: uld ignores"]),
    ({**TEACHER, "method": "sft", "temperature": 2}, ["temperature", "method: sft ignores"]),
    ({**TEACHER, "method": "kd", "projector": {"init": "random"}}, ["projector", "method: kd ignores"]),
    ({**TEACHER, "method": "span_kd", "span_weight": 1}, ["span_weight", "method: span_kd ignores"]),
    ({**TEACHER, "method": "span_kd", "shared": "ids"}, ["shared", "method: span_kd ignores"]),
    ({**TEACHER, "method": "span_kd", "alignment": "cma"}, ["alignment", "belongs to dskd"]),
    ({**TEACHER, "method": "csd", "alm": {"bias_threshold": 0}}, ["alm", "method: csd ignores"]),
    ({**TEACHER, "alm": {"bias_threshold": 0}}, ["method: dskd ignores", "Remove it, or choose method: alm."]),
    ({**TEACHER, "method": "alm", "alm": {"bias_threshold": 1}}, ["dskd.alm.bias_threshold: expected less than 1"]),
    ({**TEACHER, "method": "alm", "alm": {"threshold": 0}}, ["dskd.alm.threshold", "Did you mean 'bias_threshold'?"]),
    ({**TEACHER, "method": "alm", "temperature": 2}, ["temperature", "method: alm ignores"]),
    ({**TEACHER, "method": "gold", "divergence": {"kind": "js"}}, ["divergence", "method: gold ignores"]),
    ({**TEACHER, "method": "gold", "gold": {"beta": 1}}, ["dskd.gold.beta: expected less than 1, got 1"]),
    (
        {**TEACHER, "method": "gold", "gold": {"matched_weight": 1}},
        ["dskd.gold: expected matched_weight and unmatched_weight together", "got 1.0 and None", "Set both"],
    ),
    (
        {**TEACHER, "method": "gold", "gold": {"matched_weight": 0, "unmatched_weight": 0}},
        ["dskd.gold: expected", "got 0.0 and 0.0"],
    ),
    (
        {**TEACHER, "method": "xtoken", "divergence": {"kind": "js"}, "xtoken": {"loss": "hybrid", "top_k": 9}},
        ["divergence, xtoken.top_k which xtoken.loss: hybrid ignores"],
    ),
    (
        {**TEACHER, "method": "xtoken", "xtoken": {"loss": "p_kl"}},
        ["dskd.xtoken.loss: expected 'projected' or 'hybrid'"],
    ),
    (
        {**TEACHER, "method": "xtoken", "xtoken": {"top_k": 0}},
        ["dskd.xtoken.top_k: expected greater than or equal to 1"],
    ),
    ({**TEACHER, "method": "xtoken", "span_weight": 1}, ["span_weight", "method: xtoken ignores"]),
    ({**TEACHER, "method": "mined", "alignment": "eta"}, ["alignment", "method: mined ignores"]),
    ({**TEACHER, "method": "overlap_kd", "alignment": "cma"}, ["alignment", "belongs to dskd"]),
    ({**TEACHER, "alignment": "cma", "unmapped_argmax": "drop"}, ["unmapped_argmax", "alignment: cma ignores"]),
    (
        {**TEACHER, "alignment": "cma", "projector": {"labels": "soft"}},
        ["projector.labels", "alignment: cma ignores"],
    ),
    ({**TEACHER, "spaces": "teacher", "projector": {"labels": "hard"}}, ["projector.labels", "ignores"]),
    ({**TEACHER, "method": "dsdk"}, ["dskd.method", "Did you mean 'dskd'?"]),
    ({**TEACHER, "on_policy": {}}, ["dskd.on_policy.fraction: expected a value, got nothing"]),
    ({**TEACHER, "on_policy": {"fraction": 0}}, ["dskd.on_policy.fraction: expected greater than 0, got 0"]),
    (
        {**TEACHER, "on_policy": {"fraction": 1, "top_P": 0.9}},
        ["dskd.on_policy.top_P", "Did you mean 'top_p'?"],
    ),
    (
        {**TEACHER, "kd_weight": "balance"},
        ["dskd.kd_weight: expected 'fixed' or 'balanced'", "Did you mean 'balanced'?"],
    ),
    ({**TEACHER, "kd_weight": "balanced", "kd_ratio": 1}, ["dskd.kd_weight: expected 'fixed' beside kd_ratio: 1"]),
    ({**TEACHER, "method": "sft", "kd_weight": "fixed"}, ["kd_weight", "method: sft ignores"]),
    ({**TEACHER, "method": "overlap_kd", "support": 16}, ["dskd.shared: expected 'ids' beside support, got 'events'"]),
    (
        {**TEACHER, "method": "overlap_kd", "shared": "ids", "support": 1},
        ["dskd.support: expected greater than or equal to 2, got 1"],
    ),
    ({**TEACHER, "method": "bpm", "support": 16}, ["support", "method: bpm ignores"]),
    (
        {**TEACHER, "method": "bpm", "bpm": {"mask_whitespace": False}},
        ["dskd.bpm.mask_whitespace: expected it unset beside shared: events"],
    ),
    ({**TEACHER, "bpm": {"mask_whitespace": True}}, ["bpm", "method: dskd ignores"]),
    ({**TEACHER, "alignment": "cma", "bpm": {}}, ["bpm", "alignment: cma ignores"]),
    ({**TEACHER, "method": "bpm", "bpm": {"mask": True}}, ["dskd.bpm.mask: expected one of mask_whitespace"]),
    (
        {**TEACHER, "method": "bpm", "divergence": {"kind": "reverse_kl"}},
        ["dskd.divergence.kind", "got 'reverse_kl'", "skewed_reverse_kl"],
    ),
    ({**TEACHER, "shared": "ids", "support": 16}, ["dskd.support", "method: dskd", "use method: overlap_kd"]),
    ({**TEACHER, "alignment": "cma", "support": 16}, ["support", "alignment: cma ignores"]),
    ({**TEACHER, "method": "kd", "support": 16}, ["support", "method: kd ignores"]),
    ({**TEACHER, "unpaired": "all"}, ["dskd.unpaired: expected 'auto', 'share' or 'ce', got 'all'"]),
    ({**TEACHER, "method": "sft", "unpaired": "share"}, ["unpaired", "method: sft ignores"]),
    ({**TEACHER, "unpaired": "ce", "on_policy": {"fraction": 1}}, ["dskd.unpaired: expected 'share' beside on_policy"]),
    ({**TEACHER, "kd_ratio": 7, "tempe": 1}, ["dskd.kd_ratio", "dskd.tempe"]),
]


@pytest.mark.parametrize(("block", "says"), BAD, ids=[says[0][:40] for _, says in BAD])
def test_bad_block_is_explained(block, says):
    with pytest.raises(ValueError) as error:
        parse_settings(block)
    for part in says:
        assert part in str(error.value)
    assert "pydantic" not in str(error.value)


def test_defaults():
    settings = parse_settings(TEACHER)
    assert settings.model_dump() == {
        "teacher": {
            "model": "some/teacher",
            "revision": None,
            "adapter": None,
            "dtype": "bfloat16",
            "quantization": "none",
            "device": None,
            "offload": False,
            "attn_implementation": None,
            "chat_template": "tokenizer_default",
            "chat_template_kwargs": None,
            "sequence_len": None,
            "cache": None,
        },
        "teachers": None,
        "method": "dskd",
        "alignment": "auto",
        "divergence": {"kind": "forward_kl"},
        "temperature": 1.0,
        "kd_ratio": 0.5,
        "kd_weight": "fixed",
        "unpaired": "auto",
        "spaces": "student",
        "target": "exact",
        "shared": "events",
        "support": None,
        "guard": True,
        "agreement_mask": False,
        "unmapped_argmax": "drop",
        "span_weight": 0.0,
        "projector": {
            "init": "ideal",
            "learning_rate": 5e-4,
            "labels": "soft",
            "top_vocab": None,
            "warmup_steps": 0,
        },
        "bpm": {"mask_whitespace": True},
        "alm": {"bias_threshold": 0.1},
        "xtoken": {"loss": "projected", "top_k": 8192},
        "gold": {"beta": 0.5, "matched_weight": None, "unmatched_weight": None},
        "impl": "blocks",
        "on_policy": None,
    }


def test_unknown_keys_are_forbidden_inside_the_block_only():
    assert DSKDArgs(something_of_the_host=1).dskd is None
    with pytest.raises(ValidationError):
        DSKDArgs(dskd={**TEACHER, "something": 1})


@pytest.mark.parametrize(
    "kind", ["forward_kl", "reverse_kl", "js", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl", "tvd"]
)
def test_every_divergence_of_the_schema_exists_with_its_knobs(kind):
    from dskd_plugin.core.divergences import DIVERGENCES, divergence

    knobs = parse_settings({**TEACHER, "divergence": {"kind": kind}}).divergence.model_dump()
    assert callable(divergence(knobs.pop("kind"), **knobs))
    assert kind in DIVERGENCES


def test_a_setting_is_read_under_its_old_name_for_one_release():
    new, old = parse_settings({**TEACHER, "span_weight": 0.5}), parse_settings({**TEACHER, "chunk_ratio": 0.5})
    assert old == new and old.span_weight == 0.5
    assert DSKDArgs.model_validate({"dskd": {**TEACHER, "chunk_ratio": 0.5}}).dskd == new


def test_the_old_name_is_checked_like_the_new_one():
    for block, words in (
        ({"chunk_ratio": -1}, "dskd.span_weight: expected greater than or equal to 0, got -1"),
        ({"chunk_ratio": 1, "method": "sft"}, "span_weight which method: sft ignores"),
        ({"chunk_ratio": 1, "span_weight": 1}, "chunk_ratio: expected span_weight alone"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_settings({**TEACHER, **block})
