"""Training with the teacher on a device that the recipe names: the same curve, and what cannot be is told."""

import pytest

pytestmark = pytest.mark.e2e


@pytest.fixture
def teacher(recipe):
    """The ``dskd:`` block with settings of the teacher."""
    return lambda **more: {"teacher": {**recipe["dskd"]["teacher"], **more}}


def test_the_curve_is_the_same_wherever_the_teacher_is(train, teacher):
    here, named, waits = train("here"), train("cpu", dskd=teacher(device="cpu")), train("w", dskd=teacher(offload=True))
    assert named.curve() == here.curve() == waits.curve()  # bit for bit
    assert "the teacher is on the CPU already: teacher.offload changes nothing here" in waits.output


def test_a_device_that_is_not_here_is_told(run_axolotl, recipe, teacher):
    refused = run_axolotl({**recipe, "dskd": {**recipe["dskd"], **teacher(device="cuda:1")}})
    assert refused.code != 0
    assert "dskd.teacher.device: expected cpu on a machine without CUDA, got 'cuda:1'. Choose" in refused.output
    assert "Traceback" not in refused.output.splitlines()[-1]


def test_a_quantised_teacher_on_the_cpu_beside_a_student_in_pieces(train, teacher, tmp_path, options):
    pytest.importorskip("bitsandbytes")
    whole = train("whole", gradient_accumulation_steps=1, micro_batch_size=4, dskd=teacher(quantization="8bit"))
    block = teacher(quantization="8bit", device="cpu")
    split = train("split", ranks=2, gradient_accumulation_steps=1, dskd=block, **options("zero3", tmp_path))
    # 8-bit products round by what else is in the batch; 1e-3 was seen.
    assert split.curve() == [pytest.approx(step, rel=5e-3) for step in whole.curve()]
