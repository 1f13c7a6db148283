# SPDX-License-Identifier: Apache-2.0
"""Threads wait for each other, awake or asleep, on cores that they have to share."""

import threading

import pytest
import torch

from spon_plugin.kernels.cpu import kernel

pytestmark = pytest.mark.skipif(not kernel.is_available(), reason="needs Numba and GNU's OpenMP")

ROUNDS = 3000


@pytest.fixture(scope="module")
def rounds():
    """A thread function: thread t writes round r to ``written[t]``, waits, and counts others that are elsewhere."""
    from numba import carray, cfunc, types

    from spon_plugin.kernels.cpu.barrier import _seconds, wait_for_all
    from spon_plugin.kernels.cpu.numba_types import pointer
    from spon_plugin.kernels.cpu.steps import OPTIONS, thread_count, thread_number

    def worker(words):
        fields = carray(words, 5)
        thread, threads = thread_number(), thread_count()
        written = carray(pointer(fields[0], types.int64), (threads, 8))
        wrong = carray(pointer(fields[1], types.int64), (threads, 8))
        for turn in range(1, fields[2] + 1):
            if fields[3] and turn % fields[3] == 0 and thread == turn % threads:
                start = _seconds()
                while _seconds() - start < 1e-3:  # longer than the others' patience
                    pass
            written[thread, 0] = turn
            wait_for_all(fields[4], threads)
            for other in range(threads):
                wrong[thread, 0] += written[other, 0] != turn
            wait_for_all(fields[4], threads)

    return cfunc(types.void(types.CPointer(types.int64)), **OPTIONS)(worker)


def run(function, threads, late=0, count=ROUNDS):
    """How often a thread saw another in another round, and the barrier afterwards."""
    written, wrong = torch.zeros(2, threads, 8, dtype=torch.int64)
    barrier = kernel.new_barrier()
    fields = torch.tensor([written.data_ptr(), wrong.data_ptr(), count, late, barrier.data_ptr()])
    kernel.parallel()(function.address, fields.data_ptr(), threads, 0)
    assert written[:, 0].tolist() == [count] * threads
    return int(wrong.sum()), barrier


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_nobody_goes_on_before_all_have_come(rounds, threads):
    wrong, barrier = run(rounds, threads)
    assert wrong == 0
    come, times, asleep, _ = barrier[:4].tolist()
    assert (come, times, asleep) == (0, 2 * ROUNDS, 0)


@pytest.mark.parametrize("late", [1, 3, 40], ids=lambda every: f"late every {every}")
def test_who_sleeps_is_woken(rounds, late):
    wrong, barrier = run(rounds, 3, late, count=400)
    assert wrong == 0
    assert barrier[2].item() == 0


def test_waits_that_were_long_in_a_row_make_threads_sleep_at_once(rounds):
    _, barrier = run(rounds, 2, late=1, count=60)
    assert barrier[3].item() > 8


def test_a_python_thread_has_a_barrier_of_its_own():
    seen = [kernel.barrier(), kernel.barrier()]
    thread = threading.Thread(target=lambda: seen.append(kernel.barrier()))
    thread.start()
    thread.join()
    assert seen[0] == seen[1] != seen[2]
    assert kernel.barrier_of_programs() not in seen
