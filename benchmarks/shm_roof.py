"""What KV through shared memory could reach at most: the copies and checksums of `shm`, and next to nothing else.

usage: python -P benchmarks/shm_roof.py [--rounds 25] [--frame-mib 2 4 8 16]

Two processes, two threads each. Those of the sender copy frames into the receiver's pool and tell of each by a datagram
on a Unix socket; those of the receiver read them and verify what lies there. Before it a question and an answer, at the
end one word: no event loop, no gRPC, no lock, no check of what came. 128 MiB in the pieces of a pool of the 160M shape.
Rounds take turns; medians. With -P, for `kv_transfer` is the package then, not the benchmark of that name.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kv_transfer.carriers.shm.memory import PeerMemory, SharedMemory
from kv_transfer.frames.cells import Cells
from kv_transfer.frames.layout import KVLayout, cut
from tandem.config import load_config
from tandem.engine.backends.backend import tune_process
from tandem.engine.backends.cpu.memory import use_huge_pages
from tandem.types import Fingerprint

# The 160M shape in float32: 72 KiB a token, 128 MiB in all.
LAYOUT = KVLayout.of(Fingerprint("c", "w", "float32", 16, 12, 12, 64, 1))
TOKENS = 1820
# What one step of a prefill makes final.
CHUNK = 512
BLOCKS = -(-TOKENS // LAYOUT.block_size)
POOL_BYTES = LAYOUT.payload_bytes(LAYOUT.num_layers, BLOCKS * LAYOUT.block_size)
GIGABYTES = LAYOUT.payload_bytes(LAYOUT.num_layers, TOKENS) / 1e9
THREADS = 2
# What is told: how many frames come, or of one that is written, checked or not, its layers, positions and crc32.
NOTICE = struct.Struct("<iiiiiI")
OPEN, CHECKED, UNCHECKED = range(3)


@dataclass(frozen=True)
class Frame:
    layers: range
    tokens: range
    checked: bool


def frames(mib: float, checked: bool) -> Iterator[Frame]:
    for start in range(0, TOKENS, CHUNK):
        tokens = range(start, min(start + CHUNK, TOKENS))
        for layers, part in cut(range(LAYOUT.num_layers), tokens, int(mib * (1 << 20)) // LAYOUT.payload_bytes(1, 1)):
            yield Frame(layers, part, checked)


def receive(link: socket.socket, hello: socket.socket) -> None:
    """In a process of its own, which is killed."""
    memory = SharedMemory()
    pool = LAYOUT.pool_in(torch.from_numpy(np.frombuffer(memory.allocate(POOL_BYTES), np.uint8)), BLOCKS).uniform_()
    use_huge_pages()
    blocks = torch.randperm(BLOCKS).tolist()
    hello.send(struct.pack(f"<ii32s{BLOCKS}i", os.getpid(), memory.fd, memory.id.encode(), *blocks))
    lock, left = threading.Lock(), 0

    def work() -> None:
        nonlocal left
        while notice := link.recv(NOTICE.size):
            kind, *fields, crc = NOTICE.unpack(notice)
            if kind == OPEN:
                left = fields[0]
                link.send(b"granted")
                continue
            layers, tokens = range(fields[0], fields[1]), range(fields[2], fields[3])
            if kind == CHECKED and Cells(pool, blocks, layers, tokens).pieces().checksum() != crc:
                print("what was written is not what lies there", file=sys.stderr)
                os._exit(1)  # and the sender hears of it
            with lock:
                left -= 1
                last = left == 0
            if last:
                link.send(b"sealed")

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Sender:
    def __init__(self, link: socket.socket, hello: socket.socket) -> None:
        pid, fd, memory_id, *self._blocks = struct.unpack(f"<ii32s{BLOCKS}i", hello.recv(1 << 20))
        self._memory = PeerMemory(pid, fd, memory_id.decode(), POOL_BYTES)
        self._target = LAYOUT.pool_in(torch.from_numpy(self._memory.bytes), BLOCKS)
        self._source = torch.empty(self._target.shape).uniform_()
        use_huge_pages()
        self._own = torch.randperm(BLOCKS).tolist()
        self._link = link
        self._frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        for _ in range(THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def transfer(self, mib: float, checked: bool) -> float:
        """GB/s."""
        todo = list(frames(mib, checked))
        started = time.perf_counter()
        self._link.send(NOTICE.pack(OPEN, len(todo), 0, 0, 0, 0))
        assert self._link.recv(16) == b"granted"
        for frame in todo:
            self._frames.put(frame)
        assert self._link.recv(16) == b"sealed"
        return GIGABYTES / (time.perf_counter() - started)

    def _work(self) -> None:
        while True:
            frame = self._frames.get()
            places = self._cells(self._target, self._blocks, frame).pieces()
            pieces = self._cells(self._source, self._own, frame).pieces()
            crc = pieces.copy_to(places, checked=frame.checked, streamed=True)
            layers, tokens, kind = frame.layers, frame.tokens, CHECKED if frame.checked else UNCHECKED
            self._link.send(NOTICE.pack(kind, layers.start, layers.stop, tokens.start, tokens.stop, crc))

    def _cells(self, pool: Tensor, blocks: Sequence[int], frame: Frame) -> Cells:
        return Cells(pool, blocks, frame.layers, frame.tokens)


def memcpy_gb_s(source: Tensor, target: Tensor) -> float:
    started = time.perf_counter()
    target.numpy()[:] = source.numpy()
    return source.nbytes / 1e9 / (time.perf_counter() - started)


def measure(sender: Sender, sizes: Sequence[float], rounds: int) -> None:
    source, target = torch.ones(32 << 20), torch.ones(32 << 20)
    cases = [(mib, checked) for mib in sizes for checked in (True, False)]
    roofs, found = [], {case: [sender.transfer(*case)] for case in cases}
    for _ in range(rounds):
        roofs.append(memcpy_gb_s(source, target))
        for case in cases:
            found[case].append(sender.transfer(*case))
    roof = statistics.median(roofs)
    print(f"memcpy {roof:.1f} GB/s")
    for mib in sizes:
        with_it, without = (statistics.median(found[mib, checked][1:]) for checked in (True, False))
        print(
            f"frames of {mib:g} MiB: {with_it:.1f} GB/s, {with_it / roof:.0%} of memcpy; unchecked {without:.1f} GB/s, "
            f"{without / roof:.0%}; the checksum costs {1 - with_it / without:.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--frame-mib", type=float, nargs="+", default=[2, 4, 8, 16])
    options = parser.parse_args()
    tune_process(load_config().engine)
    (near, far), (hello, its_hello) = (socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    if not (pid := os.fork()):
        near.close()
        hello.close()
        receive(far, its_hello)
        os._exit(0)
    far.close()
    its_hello.close()
    try:
        measure(Sender(near, hello), options.frame_mib, options.rounds)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
