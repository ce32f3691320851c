"""Head training from a feature cache beside the online loop with a frozen backbone: same data, same batch, interleaved.

    python benchmarks/cache.py [--quick] [--batch_size 16] [--out runs/bench/cache.json]

The online step is the whole loop: reading and decoding frames, the policy's forward, the head. The second part, left
out with --quick, is for the real width: one Llama-7B decoder layer is timed on one frame of 600 tokens and counted 32
times, which is less than a backbone (vision towers and data are left out), beside a head's step from a cache of such
frames. Prints tables and writes JSON; ratios of medians, as the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vla_energy.cache import CachedFrames, FeatureCache, Manifest, frame_bytes, pack
from vla_energy.config import EnergyConfig
from vla_energy.finetune.cached import CachedTraining, shuffled
from vla_energy.finetune.config import EMBEDDED, FinetuneConfig
from vla_energy.finetune.features import CacheBuilder, CacheOptions
from vla_energy.finetune.trainer import Trainer

DATASET = "metaworld_demo"
TOKENS, WIDTH, LAYERS = 600, 4096, 32


def _config(args: argparse.Namespace, runs: Path) -> FinetuneConfig:
    return FinetuneConfig(
        vla_path=EMBEDDED, run_root_dir=runs, use_proprio=True, image_aug=False, use_lora=False, precision="fp32",
        batch_size=args.batch_size, energy=EnergyConfig(freeze_backbone=True), device="cpu",
    )  # fmt: skip


def _build(args: argparse.Namespace, folder: Path) -> tuple[FeatureCache, dict[str, float]]:
    frames = 256 if args.quick else 1024
    builder = CacheBuilder(EMBEDDED, EMBEDDED, DATASET, folder, CacheOptions(max_frames=frames))
    wall, cpu = time.perf_counter(), time.process_time()
    builder.build()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    cache = FeatureCache(folder)
    per_frame = cache.nbytes / len(cache)
    return cache, {"frames": frames, "wall_s": wall, "cpu_s": cpu, "bytes_per_frame": per_frame}


def _time(run: Callable[[], Any], into: dict[str, list[float]]) -> Any:
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    into["wall"].append(1e3 * (time.perf_counter() - wall))
    into["cpu"].append(1e3 * (time.process_time() - cpu))
    return result


def compare(args: argparse.Namespace, cache: FeatureCache, runs: Path) -> dict[str, Any]:
    """Milliseconds a step, medians: of both loops, and of the online loop's parts."""
    online, offline = Trainer(_config(args, runs / "online")), CachedTraining(_config(args, runs / "offline"), cache)
    batches, rows = online.job.train.batches(args.batch_size), shuffled(len(cache), args.batch_size, 7)
    names = ("online", "cached", "of cached: gather", "of online: read", "of online: forward")
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in names}
    heads: dict[str, list[float]] = {"of online: head": [], "of cached: head": []}
    rounds, warm = (10, 2) if args.quick else (40, 4)
    for index in range(rounds + warm):
        if index == warm:
            for lists in (*found.values(), {"": heads["of online: head"], " ": heads["of cached: head"]}):
                for values in lists.values():
                    values.clear()
        metrics = _time(lambda: online.train_step(batches), found["online"])
        heads["of online: head"].append(float(metrics["energy/ms"]))
        online.step += 1
        some = next(rows)
        metrics = _time(lambda some=some: offline.train_step(some), found["cached"])
        heads["of cached: head"].append(float(metrics["energy/ms"]))
        offline.step += 1
        _time(lambda some=some: cache.batch(some), found["of cached: gather"])
        raw = _time(lambda: next(batches), found["of online: read"])
        with torch.no_grad():
            _time(lambda raw=raw: online.job.vla(online.job.to_batch(raw)), found["of online: forward"])
    batches.close()
    table = {name: {kind: statistics.median(v) for kind, v in lists.items()} for name, lists in found.items()}
    return table | {name: {"wall": statistics.median(values)} for name, values in heads.items()}


def _wide_cache(folder: Path, frames: int) -> FeatureCache:
    """Random contexts of the real size."""
    from vla_energy.backbones.tiny import EMBEDDED as TINY

    generator = torch.Generator().manual_seed(0)
    shape = {"context_dim": WIDTH, "horizon": 8, "action_dim": 7, "num_exits": 1 + LAYERS}
    chunks = torch.rand(frames, 2 + LAYERS, 8, 7, generator=generator) * 2 - 1
    context = torch.randn(frames, TOKENS, WIDTH, generator=generator)
    ids = torch.arange(frames)
    batch = CachedFrames(context, torch.ones(frames, TOKENS, dtype=torch.bool), chunks[:, 0], chunks[:, 1:], ids, ids)
    data, entry = pack([batch], "bf16")
    options = {"dtype": "bf16", "layer_exits": "raw"}
    column = {name: [0.0] * 7 for name in ("mean",)} | {name: [1.0] * 7 for name in ("std", "max", "q99")}
    field = column | {name: [-1.0] * 7 for name in ("min", "q01")} | {"mask": [True] * 6 + [False]}
    values = {"action": field, "num_transitions": frames, "num_trajectories": frames}
    where = {"folder": str(TINY), "kind": "l1", "fingerprint": ""}
    manifest = Manifest(where, {"split": "train"}, options, values, shape, frames, frames, [entry])
    folder.mkdir(parents=True)
    manifest.path(folder, 0).write_bytes(data)
    manifest.write(folder)
    return FeatureCache(folder)


def wide(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """At the real width: one decoder layer on one frame, and a head's step from a cache of such frames."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    settings = LlamaConfig(hidden_size=WIDTH, intermediate_size=11008, num_attention_heads=32)
    settings._attn_implementation = "sdpa"
    layer, rotary = LlamaDecoderLayer(settings, 0).eval(), LlamaRotaryEmbedding(settings)
    hidden = torch.randn(1, TOKENS, WIDTH)
    places = rotary(hidden, torch.arange(TOKENS)[None])
    cache = _wide_cache(folder / "wide", 16)
    training = CachedTraining(_config(args, folder / "runs"), cache)
    rows = shuffled(len(cache), args.batch_size, 7)
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in ("one layer", "cached step")}
    with torch.no_grad():
        layer(hidden, position_embeddings=places)
    training.train_step(next(rows))
    for _ in range(5):
        with torch.no_grad():
            _time(lambda: layer(hidden, position_embeddings=places), found["one layer"])
        _time(lambda: training.train_step(next(rows)), found["cached step"])
    return {name: {kind: statistics.median(v) for kind, v in lists.items()} for name, lists in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 rounds instead of 40, and without the real width")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/cache.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        cache, built = _build(args, Path(scratch) / "cache")
        table = compare(args, cache, Path(scratch))
        real = {} if args.quick else wide(args, Path(scratch))
    ratio = {kind: table["online"][kind] / table["cached"][kind] for kind in ("wall", "cpu")}
    print(f"tiny VLA, batch {args.batch_size}, medians in ms\n{'':<24}{'wall':>9}{'cpu':>9}")
    for name, values in table.items():
        print(f"{name:<24}{values['wall']:9.1f}" + (f"{values['cpu']:9.1f}" if "cpu" in values else ""))
    print(f"from the cache {ratio['wall']:.1f} times as many steps a second (CPU time {ratio['cpu']:.1f}); goal 50")
    print(
        f"built {built['frames']} frames in {built['wall_s']:.1f} s (CPU {built['cpu_s']:.1f} s), "
        f"{built['bytes_per_frame'] / 1e3:.1f} kB a frame in bf16"
    )
    print(f"a frame of {TOKENS} x {WIDTH} tokens in bf16: {frame_bytes(TOKENS, WIDTH, 33, 8, 7, 'bf16') / 1e6:.2f} MB")
    if real:
        layers = {kind: args.batch_size * LAYERS * real["one layer"][kind] for kind in ("wall", "cpu")}
        real["ratio"] = {kind: 1 + layers[kind] / real["cached step"][kind] for kind in layers}
        print(
            f"real width: one decoder layer, one frame {real['one layer']['cpu']:.0f} ms of CPU, head's step from the "
            f"cache {real['cached step']['cpu']:.0f} ms: {real['ratio']['cpu']:.0f} times as many steps"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"ms": table, "ratio": ratio, "built": built, "real_width": real, "batch_size": args.batch_size}
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
