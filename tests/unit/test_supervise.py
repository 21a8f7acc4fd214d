"""A launcher that is asked to stop asks its ranks, or tells them that it ends them at once."""

from __future__ import annotations

import json
import signal

import torch.distributed as dist

from megalite.parallel.hang import State
from megalite.parallel.supervise import Asking
from megalite.parallel.watchdog import STOP, stops_at_once


def board_of(*heeds: bool) -> dist.Store:
    board = dist.HashStore()
    for rank, each in enumerate(heeds):
        state = State(rank, 1, "step 2", "", 0.1, heeds=each)
        board.set(f"state/{rank}", json.dumps(state.to_json()))
        board.set(f"groups/{rank}", "{}")
    return board


def test_ranks_that_listen_are_asked_and_the_second_time_ended(capsys) -> None:
    board, asking = board_of(True, True), Asking(2)
    with asking.over(board):
        assert asking.ask(signal.SIGTERM) and asking.is_asked
        assert board.get(STOP) == b"SIGTERM" and not stops_at_once(board)
        asking._request._since -= 2
        assert not asking.ask(signal.SIGTERM)
    assert stops_at_once(board)
    assert capsys.readouterr().err.count("stopping after the step under way") == 1


def test_where_one_does_not_listen_yet_all_are_ended_and_know_it(capsys) -> None:
    """The other one would stop in order on the SIGTERM that ends it, and say so too."""
    board, asking = board_of(True, False), Asking(2)
    with asking.over(board):
        assert not asking.ask(signal.SIGINT)
    assert stops_at_once(board) and not board.check([STOP])
    assert capsys.readouterr().err == ""


def test_before_there_are_ranks_nobody_has_to_know() -> None:
    assert not Asking(2).ask(signal.SIGINT)
