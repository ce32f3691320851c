"""One training on several processes: who is who, what they exchange, and how all learn that one of them failed.

Every rank holds all weights and its own rows of the batch. Contexts, large, stay where they are and carry no gradient.
Chunks are gathered without gradient, energies with one, so that each rank computes the loss of the whole batch; the
gradients of the weights are then averaged. Random numbers are drawn for the whole batch on every rank, from equal
generators. So N ranks with b rows each take the step that one process takes with N * b rows.

Nothing here is torchrun's own: any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT will do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vla_energy.contact import Contact, RankError, words
from vla_energy.pulse import Pulse

logger = logging.getLogger(__name__)

T = TypeVar("T")

TIMEOUT = timedelta(seconds=45)
"""Of the exchanges within a step: none of them waits for reading, validation or saving."""
MEETING = timedelta(minutes=5)
"""In which all processes have to come: imports from a cold network drive take long, and one that failed never comes."""
_PATIENCE = timedelta(days=7)  # of `share`, which does; who dies closes its connection, who stops leaves no beat
_BUCKET = 2**23  # numbers that are averaged in one message


class Ranks:
    """The processes of one training, seen from one of them; `ALONE` is the only process, and exchanges nothing.

    Args:
        rank, world: this process's number, and how many there are.
        device: of the model; None leaves it to the flags.
        contact: the lines to the others; None leaves it to the exchanges' own errors to tell that one failed.

    Attributes:
        traffic: bytes that this rank contributed to exchanges, by kind.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, device: torch.device | None = None, contact: Contact | None = None
    ) -> None:
        self.rank, self.world, self.device = rank, world, device
        self.traffic: Counter[str] = Counter()
        self.contact = contact or Contact(rank, world)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def own(self, rows: Tensor) -> Tensor:
        """This rank's of the rows of the whole batch, which has the ranks' rows in their order."""
        count = len(rows) // self.world
        return rows[self.rank * count : (self.rank + 1) * count]

    def gather(self, rows: Tensor) -> Tensor:
        """The whole batch's rows, of the same number on every rank, without gradient."""
        if self.world == 1:
            return rows
        sent = rows.detach().contiguous()
        sent = sent.byte() if sent.dtype == torch.bool else sent
        parts = [torch.empty_like(sent) for _ in range(self.world)]
        self._exchange("gather", sent, lambda: dist.all_gather(parts, sent, async_op=True), parts)
        return torch.cat(parts).to(rows.dtype)

    def gather_with_gradient(self, rows: Tensor) -> Tensor:
        """As `gather`, for a loss that every rank computes of the whole batch; for energies.

        Backward, each rank keeps its own rows' gradient, times the number of ranks, and nothing is exchanged: the mean
        of the weights' gradients over the ranks is then the gradient of that loss.
        """
        return rows if self.world == 1 else _Gather.apply(rows, self)  # pyright: ignore[reportReturnType]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's `value`, which JSON can hold, in their order."""
        if self.world == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self._gather_bytes(torch.tensor([len(own)]).view(torch.uint8))
        lengths = [int(size.view(torch.int64)) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(own)] = own
        parts = zip(self._gather_bytes(padded), lengths, strict=True)
        return [json.loads(part[:length].numpy().tobytes()) for part, length in parts]

    def _gather_bytes(self, sent: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(sent) for _ in range(self.world)]
        group = self.contact.control
        self._exchange("objects", sent, lambda: dist.all_gather(parts, sent, group=group, async_op=True), parts)
        return parts

    def sum(self, values: Tensor) -> Tensor:
        """Of all ranks' values, elementwise."""
        return self._reduce("sum", values, dist.ReduceOp.SUM) if self.world > 1 else values

    def mean(self, values: Tensor) -> Tensor:
        """Of all ranks' values, elementwise."""
        return self.sum(values) / self.world if self.world > 1 else values

    def largest(self, values: Tensor) -> Tensor:
        """Of all ranks' values, elementwise."""
        return self._reduce("largest", values, dist.ReduceOp.MAX) if self.world > 1 else values

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces each gradient by its mean over the ranks, summed in fp32; one that no rank has stays None."""
        if self.world == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if not trained:
            return
        there = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8)
        there = self.largest(there.to(trained[0].device)).tolist()
        gradients = []
        for parameter, anywhere in zip(trained, there, strict=True):
            if anywhere:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten().float() for gradient in bucket])
            flat = self._reduce("gradients", flat, dist.ReduceOp.SUM).div_(self.world)
            for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    @contextlib.contextmanager
    def own_randomness(self, *key: int) -> Iterator[None]:
        """Within it torch's global state is this rank's own, decided by `key`; afterwards it is what it was.

        For dropout: ranks would draw equal masks, and where their sequences differ in length fall out of step. A key of
        the step makes a resumed run draw what the uninterrupted one does. A single process draws on as ever.
        """
        if self.world == 1:
            yield
            return
        cuda = [self.device] if self.device is not None and self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(hash((*key, self.rank)) % 2**63)
            yield

    def share(self, error: BaseException | None = None) -> None:
        """Waits for all ranks, as long as `start` allows; each brings its error, or None.

        Raises:
            RankError: another rank brings one; the rank that does raises its own.
        """
        if self.world > 1:
            failed = torch.tensor(float(error is not None))
            self._exchange(
                "control", failed, lambda: dist.all_reduce(failed, group=self.contact.control, async_op=True)
            )
            if not failed:
                return
            texts = self.gather_objects(None if error is None else words(error))
            if error is None:
                raise RankError("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text))
        if error is not None:
            raise error

    def each(self, work: Callable[[], T]) -> T:
        """`work` on every rank; all of them raise where one did, see `share`."""
        error, result = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        self.share(error)
        return result  # pyright: ignore[reportReturnType]

    def on_main(self, work: Callable[[], T]) -> T | None:
        """`work` on rank 0 while the others wait; None on those. All raise where it did, see `share`."""
        return self.each(lambda: work() if self.is_main else None)

    def check_equal(self, modules: Iterable[nn.Module | None], what: str) -> None:
        """Compares a hash of the weights that are trained.

        Raises:
            RankError: they differ; the message tells the ranks apart.
        """
        if self.world == 1:
            return
        digests = self.gather_objects(_digest(modules))
        if len(set(digests)) > 1:
            raise RankError(f"{what}: the ranks' weights differ, by hash {', '.join(digests)}: this run cannot go on")

    def _reduce(self, kind: str, values: Tensor, operation: Any) -> Tensor:
        result = values.detach().clone()
        self._exchange(kind, result, lambda: dist.all_reduce(result, op=operation, async_op=True))
        return result

    def _exchange(self, kind: str, sent: Tensor, call: Callable[[], Any], parts: Sequence[Tensor] = ()) -> None:
        self.traffic[kind] += sent.numel() * sent.element_size()
        self.contact.finish(call, (sent, *parts), patient=not sent.is_cuda)  # NCCL's have a watchdog of their own


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.ranks = ranks
        return ranks.gather(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.ranks.own(grad) * ctx.ranks.world, None


ALONE = Ranks()
"""The only process."""
_active: Ranks | None = None


def current() -> Ranks:
    """The ranks that `start` made, or those of a group that someone else did (a host); `ALONE` without either."""
    if _active is not None:
        return _active
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextlib.contextmanager
def start(device: str = "auto", longest_wait: float = math.inf) -> Iterator[Ranks]:
    """Joins the processes that the environment tells of (torchrun), and leaves them at the end; `ALONE` without.

    Args:
        device: auto, cpu or cuda: a GPU by LOCAL_RANK with NCCL, else gloo.
        longest_wait: seconds that processes wait for one that lives, but reads data, validates or saves.

    Raises:
        ValueError: the environment, or the device, does not allow it.
        RankError: another process has failed.
    """
    global _active
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if not dist.is_available():
        raise ValueError("WORLD_SIZE is above 1, and this torch was built without torch.distributed")
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    place = _device(device)
    store, rank, world = _meet(rendezvous)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=world, timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    # A connection of its own: where the store does not answer, only the thread waits.
    pulse = Pulse(PrefixStore("pulse", store.clone() if hasattr(store, "clone") else store), rank, world)
    words_in = PrefixStore("words", store)
    contact = Contact(rank, world, words_in, pulse, control, place.type != "cuda", longest_wait)
    ranks = _active = Ranks(rank, world, place, contact)
    del control  # the group lives as long as somebody holds it
    try:
        yield ranks
        ranks.share()
        dist.destroy_process_group()
    except BaseException as error:
        told = contact.named(error)
        contact.leave_word(told)
        if told is error:
            raise
        raise told from error
    finally:
        pulse.end()
        _active = None


def _meet(rendezvous: Callable[..., Any]) -> tuple[Any, int, int]:
    """The store that all processes have joined, this one's number, and how many there are.

    Raises:
        RankError: not all of them came within `MEETING`.
    """
    rank, world = os.environ.get("RANK"), os.environ["WORLD_SIZE"]
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    seconds = int(MEETING.total_seconds())
    logger.info("process %s waits for the others of %s at %s, at most %d s", rank, world, place, seconds)
    try:
        return next(iter(rendezvous("env://", timeout=MEETING)))
    except RuntimeError as error:  # torch's DistError is one
        raise RankError(
            f"process {rank} met not all {world} processes at {place} within {seconds} s: what does the output of the "
            f"others say? ({str(error).splitlines()[0]})"
        ) from error


def _device(name: str) -> torch.device:
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise ValueError(f"--device {name} with several processes: known are auto, cpu and cuda, a GPU for each")
    if torch.cuda.device_count() <= local:
        raise ValueError(
            f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(part.numel() for part in bucket) + gradient.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _digest(modules: Iterable[nn.Module | None]) -> str:
    found = hashlib.sha256()
    for module in modules:
        for parameter in () if module is None else module.parameters():
            if parameter.requires_grad and not hasattr(parameter, "full_tensor"):  # a shard is each rank's own
                found.update(parameter.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()[:16]
