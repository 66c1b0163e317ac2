"""Rows that ranks compute together, whatever the attention and however many completions; jobs: test_sequence_jobs."""

import pytest


@pytest.mark.distributed
def test_two_ranks_give_what_one_does(forks, tmp_path):
    codes, output = forks.run([], 2, tmp_path, module="tests.workers.spread")
    assert codes == [0, 0], output[-3000:]
