"""Two processes in a group on this machine, gloo or NCCL with a GPU each, which run functions for tests."""

import multiprocessing
import os
import pickle
import sys
import time
import traceback

WORLD = 2
# A collective that one process never reaches ends with an error after this long; so does a job, in the parent.
COLLECTIVE_SECONDS, JOB_SECONDS = 60, 150


class Processes:
    """Started once, since importing takes longer than a job. They meet through a file: no port can be taken."""

    def __init__(self, folder, set_up=None, backend="gloo"):
        spawn = multiprocessing.get_context("spawn")
        self._folder, self._spawn, self._started = folder, spawn, 0
        self._options = (set_up, backend)
        self._workers = []

    def run(self, job, *args):
        """``job(*args)`` in both; what each returned, by rank. ``job`` is a function of a module.

        Raises:
            RuntimeError: one failed, with its traceback, or neither ended in time.
        """
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send_bytes(pickle.dumps((job, args)))
        try:
            return self._results(job.__name__)
        except BaseException:
            self.stop()  # what one process left undone, the other may wait for
            raise

    def stop(self):
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self):
        self._started += 1
        meeting = self._folder / f"meeting-{self._started}"
        for rank in range(WORLD):
            ours, theirs = self._spawn.Pipe()
            process = self._spawn.Process(target=_serve, args=(rank, str(meeting), theirs, *self._options))
            process.daemon = True
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _results(self, name):
        deadline, results = time.monotonic() + JOB_SECONDS, {}
        while len(results) < WORLD:
            for rank, (process, pipe) in enumerate(self._workers):
                if rank in results or not pipe.poll(0.02):
                    continue
                try:
                    results[rank], error = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    process.join(5)
                    raise RuntimeError(f"process {rank} died in {name}, exit code {process.exitcode}") from None
                if error is not None:
                    raise RuntimeError(f"{name} failed in process {rank}:\n{error}")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{name} has not ended after {JOB_SECONDS} s in {sorted(set(range(WORLD)) - set(results))}"
                )
        return [results[rank] for rank in range(WORLD)]


def own_device():
    """Of the process that a job runs in."""
    import torch

    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


def _serve(rank, meeting, pipe, set_up, backend):
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    )
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import datetime

    import torch

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{meeting}", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )  # fmt: skip
    if set_up is not None:
        set_up()
    while True:
        try:
            job, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = job(*args), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
