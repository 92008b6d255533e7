"""Which failures are final, and what they say."""

import pytest

from posttrain.ground.errors import Diverged, Interrupted, UserError
from posttrain.jobs import failure


def test_a_mistake_that_training_found_is_final(here):
    checkpoints = here / "checkpoints"
    checkpoints.mkdir()
    with pytest.raises(UserError), failure.remembered(checkpoints):
        raise Diverged("the loss is nan at step 7")
    with (
        pytest.raises(UserError, match=r"the loss is nan at step 7\n.*rm .*failed.json"),
        failure.remembered(checkpoints),
    ):
        pytest.fail("it was tried again")
    (checkpoints / "failed.json").unlink()
    with failure.remembered(checkpoints):
        pass


SITES = UserError("batch_size 64 cannot be shared evenly by 3 processes")  # what slurm/site.yaml mends


@pytest.mark.parametrize("error", [Interrupted("saved"), OSError(5, "Input/output error"), RuntimeError("CUDA"), SITES])
def test_what_may_go_well_another_time_is_tried_again(here, error):
    checkpoints = here / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "progress.json").write_text("{}")
    with pytest.raises(type(error)), failure.remembered(checkpoints):
        raise error
    with failure.remembered(checkpoints):
        pass


def test_a_mistake_before_training_is_tried_again(here):
    with pytest.raises(UserError), failure.remembered(here / "checkpoints"):
        raise UserError("there are no rows")
    with failure.remembered(here / "checkpoints"):
        pass


def test_a_full_disk_is_told_in_words(here):
    with pytest.raises(UserError, match="the disk is full"), failure.remembered(here / "checkpoints"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
