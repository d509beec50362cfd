"""Episodes side by side."""

import numpy as np
import pytest

from vla.sim.episodes import Lane, film_fps, film_stride
from vla.sim.tabletop import Tabletop


def test_lane_begins_and_goes_on_with_episodes_by_their_numbers():
    lane = Lane("tabletop", 32, expert=False)
    waiting, done = lane([(4, 0, False), (7, 1, True)], {})
    assert (waiting.keys(), done) == ({4, 7}, {})
    assert [(steps, seen["images"].shape) for steps, seen in waiting.values()] == [(0, (2, 3, 32, 32))] * 2
    for chunk in range(1, 4):
        waiting, done = lane([], {4: np.zeros((10, 3)), 7: np.zeros((9, 3))})
        assert {number: steps for number, (steps, _) in waiting.items()} == {4: 10 * chunk, 7: 9 * chunk}
    waiting, done = lane([], {4: np.zeros((10, 3)), 7: np.zeros((9, 3))})
    assert (waiting.keys(), done.keys()) == ({7}, {4})
    assert (done[4].steps, done[4].success, done[4].frames) == (40, False, [])
    waiting, done = lane([(5, 2, False)], {7: np.zeros((9, 3))})
    assert (waiting.keys(), done.keys(), len(done[7].frames)) == ({5}, {7}, 41)


@pytest.mark.parametrize(("fps", "stride", "shown"), [(10, 1, 10), (20, 1, 20), (30, 2, 15), (80, 4, 20)])
def test_films_have_at_most_twenty_frames_a_second(monkeypatch, fps, stride, shown):
    assert (film_stride(fps), film_fps(fps)) == (stride, shown)
    monkeypatch.setattr(Tabletop, "fps", fps)
    _, done = Lane("tabletop", 32, expert=True)([(0, 0, True)], {})
    assert len(done[0].frames) == -(-done[0].steps // stride) + 1
