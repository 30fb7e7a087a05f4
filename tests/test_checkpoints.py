"""Checkpoints of a small state: what is saved, kept, found damaged, and used instead."""

from __future__ import annotations

import logging
import resource
import shutil
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from model_helpers import assert_same_params
from orbax.checkpoint import v1 as ocp

from jaxreset.config import Checkpoint
from jaxreset.errors import RunError
from jaxreset.learning.learner import TrainProgress
from jaxreset.learning.update import TrainState
from jaxreset.run import checkpoints
from jaxreset.run.checkpoints import Checkpoints, saved_steps
from jaxreset.run.checksums import checksum
from jaxreset.run.saved_arrays import abstract, load_params, save_params


@partial(jax.jit, donate_argnums=0)
def advance(state):
    return jax.tree.map(lambda x: (x + 1).astype(x.dtype), state)


def make_state(sharding=None, *, size=40):
    """Twice `size` rows of 64 numbers, a count, and a mask, all different."""
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(size, 64)), jnp.float32)
    narrow = jnp.asarray(rng.normal(size=(size, 64)), jnp.bfloat16)
    state = TrainState({"w": rows, "b": narrow}, {"count": jnp.int32(3)}, {"mask": rows > 0})
    return state if sharding is None else jax.device_put(state, sharding(state))


def over_mesh(shape):
    """The shardings of a state's leaves: rows over the first two axes, numbers over the last."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("a", "b", "c"))
    return partial(
        jax.tree.map,
        lambda x: NamedSharding(mesh, PartitionSpec(*[("a", "b"), "c"][: x.ndim])),
    )


def saved(path, steps, state=None, **kept):
    """Checkpoints of the steps, with 5 prompts taken in each."""
    checkpoints = Checkpoints(path, Checkpoint(**({"keep": 9} | kept)))
    state = state or make_state()
    for step, metrics in steps.items() if isinstance(steps, dict) else dict.fromkeys(steps).items():
        checkpoints.save(state, TrainProgress(step=step, data_position=5 * step), metrics)
    checkpoints.close()
    return state


@pytest.fixture
def writing(monkeypatch):
    """Writing in the background waits until this event is set."""
    event, run = threading.Event(), threading.Thread.run

    def wait_first(thread):
        if thread.name == "async_save":  # Orbax's
            event.waiting = True
            assert event.wait(60)
        run(thread)

    monkeypatch.setattr(threading.Thread, "run", wait_first)
    return event


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_a_state_may_be_overwritten_before_it_is_written(tmp_path, mesh, writing):
    state = make_state(mesh and over_mesh(mesh), size=4000)
    expected = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path, Checkpoint())
    checkpoints.save(state, TrainProgress(step=1))
    for _ in range(3):  # into the same memory, where the device can
        state = advance(state)
    jax.block_until_ready(state)
    assert writing.waiting
    assert not list(tmp_path.rglob("commit_success.txt"))
    writing.set()
    checkpoints.close()
    restored, progress = checkpoints.restore(abstract(state))
    assert progress.step == 1
    assert_same_params(restored, expected)


@pytest.mark.parametrize(
    ("before", "after"), [(None, (2, 2, 2)), ((8, 1, 1), (2, 2, 2)), ((2, 2, 2), None)]
)
def test_a_checkpoint_fits_any_mesh(tmp_path, before, after):
    state = saved(tmp_path, [3], make_state(before and over_mesh(before)))
    like = abstract(make_state(after and over_mesh(after)))
    restored, progress = Checkpoints(tmp_path, Checkpoint()).restore(like)
    assert progress == TrainProgress(step=3, data_position=15)
    assert_same_params(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)


def test_checksums_see_every_bit_and_place_and_no_layout():
    def sums_of(tree):
        return [int(checksum(leaf)) for leaf in jax.tree.leaves(tree)]

    whole = sums_of(make_state())
    assert len(set(whole)) == 4
    for shape in ((8, 1, 1), (2, 2, 2)):
        assert sums_of(make_state(over_mesh(shape))) == whole

    words = np.asarray(make_state().params["w"]).view(np.uint32)
    sums = {int(checksum(words))}
    for bit in range(32):
        flipped = words.copy()
        flipped[7, 11] ^= np.uint32(1 << bit)
        sums.add(int(checksum(flipped)))
    for a, b in (((0, 0), (0, 1)), ((0, 0), (32, 0)), ((1, 2), (2, 1))):
        swapped = words.copy()
        swapped[a], swapped[b] = words[b], words[a]
        sums.add(int(checksum(swapped)))
    assert len(sums) == 1 + 32 + 3
    with jax.enable_x64(True):
        double = np.arange(6.0).reshape(2, 3)
        assert checksum(double) != checksum(np.nextafter(double, 9))


def flip_a_bit(folder):
    """In the largest file, which holds numbers: Orbax doesn't notice."""
    largest = max((folder / "state").rglob("*"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 16
    largest.write_bytes(data)


def cut(name):
    def half(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return half


def other_progress(folder):
    """A file of the right form and checksum of its own, from another checkpoint."""
    shutil.rmtree(folder / "progress")
    shutil.copytree(folder.parent / "1" / "progress", folder / "progress")


DAMAGES = {
    "a bit": (flip_a_bit, "other bits than were saved: "),
    "progress": (other_progress, "other bits than were saved: progress"),
    "manifest": (cut("state/manifest.ocdbt"), "DATA_LOSS"),
    "tree": (cut("state/_METADATA"), "JSONDecodeError"),
    "no arrays": (lambda folder: shutil.rmtree(folder / "state" / "d"), "NOT_FOUND"),
    "no state": (lambda folder: shutil.rmtree(folder / "state"), "KeyError"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), ""),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage, words, caplog):
    state = saved(tmp_path, [1, 2, 3])
    damage(tmp_path / "3")
    checkpoints = Checkpoints(tmp_path, Checkpoint())
    with caplog.at_level(logging.WARNING, "jaxreset"):
        restored, progress = checkpoints.restore(state, set_aside=True)
    assert progress == TrainProgress(step=2, data_position=10)
    assert_same_params(restored, state)
    assert f"checkpoint {tmp_path}/3 is damaged ({words}" in caplog.text.replace("ValueError: ", "")
    assert "going back to step 2" in caplog.text
    # and it isn't in the way of its step
    assert saved_steps(tmp_path) == [1, 2]
    checkpoints.save(restored, progress._replace(step=3))
    checkpoints.close()
    assert Checkpoints(tmp_path, Checkpoint()).restore(state)[1].step == 3
    assert (tmp_path / "3.damaged").is_dir()


@pytest.mark.parametrize("after", [None, (2, 2, 2)])
def test_parameters_are_restored_alone(tmp_path, after, caplog, monkeypatch):
    """The rest is looked at in portions of which none is larger than a parameter."""
    state = saved(tmp_path, [1, 2, 3])
    like = abstract(make_state(after and over_mesh(after)).params)
    read, load = [], ocp.load_checkpointables

    def spy(path, wanted):
        read.append(set(wanted["state"]))
        return load(path, wanted)

    monkeypatch.setattr(ocp, "load_checkpointables", spy)
    params, progress = Checkpoints(tmp_path, Checkpoint()).restore_params(like)
    assert progress == TrainProgress(step=3, data_position=15)
    assert_same_params(params, state.params)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, like)
    assert read == [{"gradients.mask", "opt_state.count"}, {"params.b", "params.w"}]

    other_progress(tmp_path / "3")
    flip_a_bit(tmp_path / "2")
    with caplog.at_level(logging.WARNING, "jaxreset"):
        params, progress = Checkpoints(tmp_path, Checkpoint()).restore_params(like)
    assert progress.step == 1
    assert_same_params(params, state.params)
    assert "3 is damaged (other bits than were saved: progress)" in caplog.text
    assert "2 is damaged (" in caplog.text
    with pytest.raises(
        RunError, match=r"1 is damaged \(ValueError: no array params.c"
    ):  # another's
        Checkpoints(tmp_path, Checkpoint()).restore_params({"c": like["w"]})
    with pytest.raises(FileNotFoundError):
        Checkpoints(tmp_path / "none", Checkpoint()).restore_params(like)


def test_damage_beside_the_parameters_is_found_too(tmp_path, monkeypatch, caplog):
    """A checkpoint that training calls damaged is so for an evaluation."""
    state, with_sums = saved(tmp_path, [1]), checkpoints.with_sums

    def flipped(*args):
        made = with_sums(*args)
        return made | {"state": made["state"] | {"gradients.mask": ~state.gradients["mask"]}}

    monkeypatch.setattr(checkpoints, "with_sums", flipped)
    saved(tmp_path, [2])
    params, progress = Checkpoints(tmp_path, Checkpoint()).restore_params(state.params)
    assert progress.step == 1
    assert_same_params(params, state.params)
    assert "2 is damaged (other bits than were saved: gradients.mask)" in caplog.text


def test_nothing_is_touched_by_reading(tmp_path, caplog):
    """An evaluation beside a run must not remove what the run is writing."""
    state = saved(tmp_path, [1, 2])
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    flip_a_bit(tmp_path / "2")
    assert Checkpoints(tmp_path, Checkpoint()).restore(state)[1].step == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["1", "2", "3.orbax-checkpoint-tmp"]


def test_where_all_are_damaged_nothing_starts_anew(tmp_path):
    state = saved(tmp_path, [1, 2])
    for step in ("1", "2"):
        flip_a_bit(tmp_path / step)
    checkpoints = Checkpoints(tmp_path, Checkpoint())
    assert checkpoints.any()
    with pytest.raises(RunError, match="There is no other to go back to: bring one") as refused:
        checkpoints.restore(state, set_aside=True)
    assert f"{tmp_path}/1 is damaged" in str(refused.value)
    assert f"{tmp_path}/2 is damaged" in str(refused.value)
    assert saved_steps(tmp_path) == [1, 2]
    with pytest.raises(FileNotFoundError):
        Checkpoints(tmp_path / "none", Checkpoint()).restore(state)


def test_a_checkpoint_of_other_shapes_is_not_called_damaged(tmp_path):
    saved(tmp_path, [1, 2])
    state, checkpoints = make_state(size=41), Checkpoints(tmp_path, Checkpoint())
    said = (
        r"2 is of another policy, .*vocabulary \(\S*b is \(40, 64\) there, \(41, 64\) here\): name"
    )
    with pytest.raises(RunError, match=said):
        checkpoints.restore(state, set_aside=True)
    with pytest.raises(RunError, match=said):
        checkpoints.restore_params(state.params)
    assert saved_steps(tmp_path) == [1, 2]


def test_parameters_beside_the_checkpoints_are_checked_too(tmp_path):
    params = make_state().params
    save_params(tmp_path / "start", params)
    save_params(tmp_path / "start", params)  # a run that was killed before its first checkpoint
    assert_same_params(load_params(tmp_path / "start", params), params)
    flip_a_bit(tmp_path / "start")
    with pytest.raises(RunError, match=r"start are damaged \(other bits than were saved: "):
        load_params(tmp_path / "start", params)


def test_what_a_kill_left_is_cleaned_up(tmp_path, caplog):
    state = saved(tmp_path, {1: {"eval/accuracy": 0.5}, 2: None})
    (tmp_path / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    cut("metrics/metrics")(tmp_path / "1")  # Orbax's list of checkpoints breaks at it
    checkpoints = Checkpoints(tmp_path, Checkpoint(keep=9))
    _, progress = checkpoints.restore(state)
    checkpoints.save(state, progress._replace(step=3))
    checkpoints.close()
    assert f"{tmp_path}/1 is damaged (JSONDecodeError" in caplog.text
    assert sorted(f.name for f in tmp_path.iterdir()) == ["1.damaged", "2", "3"]


@pytest.mark.parametrize(
    ("kept", "steps", "later"),
    [
        ({"keep": 2}, [4, 5], [5, 6]),
        ({"keep": 1, "keep_best": 2}, [2, 4, 5], [2, 4, 6]),
        ({"keep": 1, "keep_every_hours": 1}, [1, 5], [1, 6]),
        ({"keep": 1, "keep_every_hours": 1e-6}, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_latest_the_best_and_one_every_few_hours_are_kept(tmp_path, kept, steps, later):
    accuracies = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.8, 5: None}
    metrics = {n: a and {"eval/accuracy": a, "loss": 1.0} for n, a in accuracies.items()}
    saved(tmp_path, metrics, **kept)
    assert saved_steps(tmp_path) == steps
    # Started again, it still knows which they are.
    saved(tmp_path, {6: {"eval/accuracy": 0.2}}, **kept)
    assert saved_steps(tmp_path) == later


def test_a_step_is_saved_once(tmp_path):
    state = saved(tmp_path, [1, 2])
    checkpoints = Checkpoints(tmp_path, Checkpoint())
    restored, progress = checkpoints.restore(state)
    checkpoints.save(restored, progress)
    checkpoints.save(restored, progress)
    checkpoints.close()
    assert saved_steps(tmp_path) == [1, 2]


@pytest.fixture
def no_room():
    """Files larger than a few bytes can't be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    yield partial(resource.setrlimit, resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("then", ["save", "close"])
def test_what_went_wrong_in_the_background_is_said_at_the_next_save_or_the_end(
    tmp_path, no_room, then
):
    checkpoints, state = Checkpoints(tmp_path, Checkpoint()), make_state(size=2000)
    checkpoints.save(state, TrainProgress(step=1))
    with pytest.raises(RunError, match=f"the checkpoint of step 1 can't be written to {tmp_path}"):
        checkpoints.close() if then == "close" else checkpoints.save(state, TrainProgress(step=2))
    no_room()
    checkpoints.close()
    assert saved_steps(tmp_path) == []
