"""Step3's text decoder in plain eager PyTorch, the peer for `step3 bench decode --torch`.

Needs only torch and numpy, so it runs in an environment without jax. It reads a folder in the released layout and
serves requests, one JSON object per line on stdin, each answered by one line on stdout:

    {"do": "open", "folder": ..., "dtypes": [...]}   reads the weights          -> versions
    {"do": "logits", "dtype": ..., "ids": [[...]], "file": ...}   writes [B, T, V] float32 as .npy   -> {}
    {"do": "prefill", "dtype": ..., "ids": [[...]], "room": n}   first tokens   -> tokens [B], seconds
    {"do": "decode", "dtype": ..., "steps": n}   n more greedy tokens of each row   -> tokens [steps, B], seconds

There is one conversation for each dtype.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time

import numpy as np
import torch
from torch.nn import functional as F

Weights = dict[str, torch.Tensor]
Cache = list[tuple[torch.Tensor, torch.Tensor]]
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


class Decoder:
    """The decoder over a dictionary of released names; formulas as in `step3_jax/layers`."""

    def __init__(self, config: dict, weights: Weights) -> None:
        """Takes the `text_config` of a released config.json, and the weights."""
        self.config, self.weights = config, weights
        moe_layers = [int(layer) for layer in config["moe_layers_enum"].split(",") if layer]
        self.is_moe = [layer in moe_layers for layer in range(config["num_hidden_layers"])]
        self.dtype = weights["model.embed_tokens.weight"].dtype
        half = torch.arange(0, config["head_dim"], 2, dtype=torch.float32) / config["head_dim"]
        self.frequencies = config["rope_theta"] ** -half

    def new_cache(self, batch: int, length: int) -> Cache:
        """Keys and values [B, S, K] of each layer."""
        shape = (batch, length, self.config["head_dim"])
        return [(torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)) for _ in self.is_moe]

    def hidden(self, ids: torch.Tensor, cache: Cache, start: int) -> torch.Tensor:
        """Normalised hidden states [B, T, D] of `ids` [B, T], which begin at position `start`; fills the cache."""
        hidden = F.embedding(ids, self.weights["model.embed_tokens.weight"])
        angles = torch.arange(start, start + ids.shape[1], dtype=torch.float32)[:, None] * self.frequencies
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        for layer in range(len(self.is_moe)):
            name = f"model.layers.{layer}."
            normed = self._norm(hidden, name + "input_layernorm")
            hidden = hidden + self._attention(name + "self_attn.", normed, cos, sin, cache[layer], start)
            normed = self._norm(hidden, name + "post_attention_layernorm")
            hidden = hidden + self._feed_forward(name, normed, self.is_moe[layer])
        return self._norm(hidden, "model.norm")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits."""
        return self._linear(hidden, "lm_head").float()

    def _linear(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(hidden, self.weights[name + ".weight"])

    def _norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return wide.to(hidden.dtype) * self.weights[name + ".weight"]

    def _attention(
        self,
        name: str,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        start: int,
    ) -> torch.Tensor:
        batch, length, _ = hidden.shape
        queries = self._linear(self._norm(self._linear(hidden, name + "q_proj"), name + "inter_norm"), name + "wq")
        queries = _rotate(queries.view(batch, length, -1, self.config["head_dim"]), cos[:, None], sin[:, None])
        keys, values = cache
        keys[:, start : start + length] = _rotate(self._linear(hidden, name + "k_proj"), cos, sin)
        values[:, start : start + length] = self._linear(hidden, name + "v_proj")
        keys, values = keys[:, None, : start + length], values[:, None, : start + length]
        # One key/value head for all query heads: they are rows of one product.
        mask = torch.ones(length, start + length, dtype=torch.bool).tril(start) if length > 1 else None
        queries = queries.transpose(1, 2)
        heads = F.scaled_dot_product_attention(
            queries, keys.expand(-1, queries.shape[1], -1, -1), values.expand(-1, queries.shape[1], -1, -1), mask
        )
        return self._linear(heads.transpose(1, 2).reshape(batch, length, -1), name + "o_proj")

    def _feed_forward(self, name: str, hidden: torch.Tensor, is_moe: bool) -> torch.Tensor:
        if not is_moe:
            return self._swiglu(hidden, name + "mlp.")
        tokens = hidden.reshape(-1, hidden.shape[-1])
        logits = F.linear(tokens.float(), self.weights[name + "moe.gate.weight"].float())
        shares, experts = torch.topk(logits.softmax(-1), self.config["moe_top_k"])
        gate, up, down = (self.weights[f"{name}moe.{part}_proj.weight"] for part in ("gate", "up", "down"))
        out = torch.zeros_like(tokens, dtype=torch.float32)
        for expert in experts.unique().tolist():
            rows, choices = torch.where(experts == expert)
            picked = tokens[rows]
            inner = F.silu(F.linear(picked, gate[expert])) * F.linear(picked, up[expert])
            made = F.linear(inner, down[expert]).float()
            out.index_add_(0, rows, made * shares[rows, choices, None])
        return out.to(hidden.dtype).view_as(hidden) + self._swiglu(hidden, name + "share_expert.")

    def _swiglu(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        inner = F.silu(self._linear(hidden, name + "gate_proj")) * self._linear(hidden, name + "up_proj")
        return self._linear(inner, name + "down_proj")


class Peer:
    """What the requests act on."""

    def __init__(self) -> None:
        self._decoders: dict[str, Decoder] = {}
        self._runs: dict[str, tuple[Cache, torch.Tensor, int]] = {}

    def open(self, folder: str, dtypes: list[str], threads: int) -> dict:
        """Reads the weights once for each dtype."""
        torch.set_num_threads(threads)
        config = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))
        weights = read_weights(pathlib.Path(folder))
        for name in dtypes:
            cast = {key: value.to(getattr(torch, name)) for key, value in weights.items()}
            self._decoders[name] = Decoder(config["text_config"], cast)
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def logits(self, dtype: str, ids: list[list[int]], file: str) -> dict:
        """Writes the logits of every token."""
        decoder, tokens = self._decoders[dtype], torch.tensor(ids)
        np.save(file, decoder.logits(decoder.hidden(tokens, decoder.new_cache(*tokens.shape), 0)).numpy())
        return {}

    def prefill(self, dtype: str, ids: list[list[int]], room: int) -> dict:
        """Reads the prompts; `room` is how many tokens may follow."""
        decoder, tokens = self._decoders[dtype], torch.tensor(ids)
        begin = time.perf_counter()
        cache = decoder.new_cache(tokens.shape[0], tokens.shape[1] + room)
        last = decoder.logits(decoder.hidden(tokens, cache, 0)[:, -1:]).argmax(-1)
        self._runs[dtype] = cache, last, tokens.shape[1]
        return {"tokens": last[:, 0].tolist(), "seconds": time.perf_counter() - begin}

    def decode(self, dtype: str, steps: int) -> dict:
        """Makes greedy tokens."""
        decoder, (cache, last, length) = self._decoders[dtype], self._runs[dtype]
        made = []
        begin = time.perf_counter()
        for step in range(steps):
            last = decoder.logits(decoder.hidden(last, cache, length + step)).argmax(-1)
            made.append(last[:, 0])
        self._runs[dtype] = cache, last, length + steps
        return {"tokens": torch.stack(made).tolist(), "seconds": time.perf_counter() - begin}


def read_weights(folder: pathlib.Path) -> Weights:
    """All tensors of the folder's safetensors files (8 bytes of header length, a JSON header, then the data)."""
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = np.fromfile(path, np.uint8)
        size = int(data[:8].view(np.uint64)[0])
        header = json.loads(data[8 : 8 + size].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            # A copy, as the file does not guarantee the alignment that a tensor needs.
            raw = torch.from_numpy(data[begin:end].copy())
            weights[name] = raw.view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return weights


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def main() -> None:
    """Serves requests until stdin ends."""
    peer = Peer()
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            answer = getattr(peer, request.pop("do"))(**request)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
