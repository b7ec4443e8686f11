"""Policies tried out before a board is: closed-loop models of boards, and replays of recorded readings."""
