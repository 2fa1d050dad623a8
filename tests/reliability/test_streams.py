"""A resumed run reads its streams on from where it stood, or says that it cannot."""

from __future__ import annotations

import itertools

import pytest

import hypergrad as hg
from tests.outer._ridge import TRAIN
from tests.reliability._runs import assert_same, at, interrupt, run

X, Y = TRAIN
BATCHES = [(X[i::5], Y[i::5]) for i in range(5)]


def stream(order=(0, 1, 2, 3, 4)):
    return hg.stream([BATCHES[i] for i in order], per_step=2)


def test_a_stream_goes_on_with_the_batch_that_is_next(tmp_path):
    expected = run(train=stream(), valid=stream(), every=3)
    run(tmp_path, train=stream(), valid=stream(), every=3, callbacks=at(5, interrupt))
    assert_same(run(tmp_path, train=stream(), valid=stream(), every=3), expected)


def test_one_stream_survives_an_interrupt_within_the_process(tmp_path):
    """A batch that was pulled for a step that never came is not lost, and none is pulled twice."""
    expected = run(train=stream(), every=3)
    train = stream()
    run(tmp_path, train=train, every=3, callbacks=at(5, interrupt))
    assert train.position == 12
    assert_same(run(tmp_path, train=train, every=3), expected)
    assert train.position == 24
    broken = itertools.chain(BATCHES, [], iter(BATCHES[:2]))
    once = hg.stream(broken, per_step=2)
    with pytest.raises(ValueError, match="ended after 1 of the 2"):
        run(train=once)
    assert once.position == 6, "the odd batch is back in the stream"


def test_a_loader_that_does_not_repeat_itself_is_noticed(tmp_path):
    run(tmp_path, train=stream(), callbacks=at(5, interrupt))
    with pytest.raises(ValueError, match=r"batch 12 of train is not the one that the run had seen.*fixed seed"):
        run(tmp_path, train=stream((1, 0, 2, 3, 4)))
    used = stream()
    for _ in range(9):
        used.next()
    used.forget()
    with pytest.raises(ValueError, match=r"20 batches were handed out already.*stands at 12.*make the stream anew"):
        run(tmp_path, train=used)
    with pytest.raises(ValueError, match=r"ended after 5 batches, and the run stands at 12"):
        run(tmp_path, train=hg.stream(iter(BATCHES), per_step=2))
    assert_same(run(tmp_path, train=stream()), run(train=stream()))
