"""The files of a checkpoint quantized by NVIDIA's Model-Optimizer: both configs, and shards with their index.

A quantized folder is a released one with hf_quant_config.json beside it, and the same content as "quantization_config" in config.json. Which layer is
stored how is said by module name, in ModelOpt's words for the formats.

Sources: [ModelOpt] NVIDIA Model-Optimizer, its unified Hugging Face export · [HF] the index of sharded safetensors files
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

ALGORITHMS = {"nvfp4": "NVFP4", "w4a16": "W4A16_NVFP4", "fp8": "FP8", "bf16": "BF16"}      # the repository's words and ModelOpt's


def quantization_config(formats: dict[str, str], kv_fp8: bool) -> tuple[dict, dict]:
    """(hf_quant_config.json, "quantization_config" of config.json) from {quantized module: format}."""
    if not formats: raise ValueError("the precision table quantizes nothing of this checkpoint: give some tensors another format than bf16.")
    width, groups = lambda fmt: {} if fmt == "fp8" else dict(group_size=16), {}
    layers = dict(quantized_layers={module: dict(quant_algo=ALGORITHMS[fmt], **width(fmt)) for module, fmt in formats.items()})
    for n, fmt in enumerate(dict.fromkeys(formats.values())):
        numbers = dict(dynamic=False, num_bits=8 if fmt == "fp8" else 4, type="float", **width(fmt))
        groups[f"group_{n}"] = dict({} if fmt == "w4a16" else dict(input_activations=numbers), weights=numbers,
                                    targets=sorted(module for module in formats if formats[module] == fmt))
    both = dict(quant_algo="MIXED_PRECISION", **layers)
    producer = dict(name="modelopt", version="0.46.0")      # readers ask for this name; the version is the one whose layout this is
    cache = dict(kv_cache_scheme=dict(dynamic=False, num_bits=8, type="float")) if kv_fp8 else {}
    return (dict(producer=producer, quantization=dict(both, kv_cache_quant_algo="FP8" if kv_fp8 else None)),
            dict(both, config_groups=groups, ignore=[], **cache, producer=producer, quant_method="modelopt"))


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Tensors, as they come, into model-0000i-of-0000n.safetensors and their index; one shard is in memory."""
    numbers, shard, size, total, count = {}, {}, 0, 0, 0
    for name, tensor in chain(tensors, [("", torch.empty(0))]):
        if shard and (not name or size + tensor.nbytes > shard_bytes):
            count, size = count + 1, 0
            safetensors.torch.save_file(shard, folder / f"{count}.part", metadata={"format": "pt"})
            numbers, shard = numbers | dict.fromkeys(shard, count), {}
        shard[name] = tensor.contiguous()
        size += tensor.nbytes; total += tensor.nbytes
    files = {i: f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    for i, file in files.items(): (folder / f"{i}.part").rename(folder / file)
    index = dict(metadata=dict(total_size=total), weight_map={name: files[i] for name, i in numbers.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def is_quantized(directory: Path) -> bool:
    """Whether the checkpoint in `directory` is; ValueError where there is none."""
    if not (directory / "config.json").exists(): raise ValueError(f"{directory} has no config.json: give a local checkpoint directory.")
    return (directory / "hf_quant_config.json").exists() or "quantization_config" in json.loads((directory / "config.json").read_text())


def read_config(directory: Path, quantized: bool) -> dict:
    """config.json of a checkpoint that is, or is not, quantized; ValueError for the other sort."""
    if is_quantized(directory) == quantized: return json.loads((directory / "config.json").read_text())
    raise ValueError(f"{directory} is not quantized: open it with load_checkpoint of stage 04." if quantized else
                     f"{directory} is quantized already: give the checkpoint that it was made from.")


def write_configs(folder: Path, source: Path, released: dict, formats: dict[str, str], kv_fp8: bool) -> None:
    """Both configs into `folder`, and what a reader of the checkpoint `source`, with config.json `released`, finds beside its weights."""
    about, brief = quantization_config(formats, kv_fp8)
    (folder / "hf_quant_config.json").write_text(json.dumps(about, indent=4))
    (folder / "config.json").write_text(json.dumps(dict(released, quantization_config=brief), indent=1))
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "generation_config.json", "*.py"):
        for file in source.glob(pattern): shutil.copy2(file, folder / file.name)
