"""Tests of policies without a board: models of boards in a closed loop, and replays of recorded readings."""
