"""A small Qwen2 in bare torch: sampling and log-probabilities on one CPU thread.

``transformers`` computes the same (tests/simulator/test_simulator.py compares them). At 200,000 parameters the time of
its forward pass is that of Python, and a study of hundreds of cells needs a loop without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding, linear, pad, rms_norm, scaled_dot_product_attention, silu

#: Rows are removed from the batch once so large a share of them has ended.
_COMPACT = 0.25
#: Keys and values of one layer, each [rows, heads, positions, head dimension].
_Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer; query, key and value share a matrix, and so do gate and up."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Samples:
    """Responses that a model sampled.

    Attributes:
        tokens: int64 [rows, length], padded on the right.
        mask: bool [rows, length], True on response tokens, the end-of-sequence token included.
        log_probs: fp32 [rows, length], of the tokens under the model at temperature 1; 0 on padding.
        entropy: fp32 [rows, length], of the distribution of each token, in nats; 0 on padding.
        finished: bool [rows], whether the end-of-sequence token was reached.
    """

    tokens: Tensor
    mask: Tensor
    log_probs: Tensor
    entropy: Tensor
    finished: Tensor


class SmallQwen2:
    """A Qwen2 with tied embeddings and as many key-value heads as heads.

    Attributes:
        parameters: All trained tensors, fp32.
        eos: Id of the end-of-sequence token.
        pad: Id of the padding token.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a checkpoint.

        Args:
            config: ``config.json`` of the checkpoint.
            weights: By the names of ``transformers``.

        Raises:
            ValueError: The checkpoint is not of this form; names the key of ``config.json``.
        """
        expected = {
            "model_type": "qwen2",
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "use_sliding_window": False,
        }
        expected["num_key_value_heads"] = config["num_attention_heads"]
        for key, value in expected.items():
            if config.get(key) != value:
                raise ValueError(
                    f"{key}={config.get(key)!r}: the simulator supports only checkpoints with {key}={value!r}"
                )
        self.eos, self.pad = int(config["eos_token_id"]), int(config["pad_token_id"])
        self._eps = float(config["rms_norm_eps"])
        self._heads = int(config["num_attention_heads"])
        self.parameters: list[Tensor] = []

        def parameter(*names: str) -> Tensor:
            made = torch.cat([weights[name].float() for name in names]).requires_grad_()
            self.parameters.append(made)
            return made

        self._embedding = parameter("model.embed_tokens.weight")
        self._norm = parameter("model.norm.weight")
        self._layers = []
        for number in range(int(config["num_hidden_layers"])):
            at = f"model.layers.{number}."
            self._layers.append(
                _Layer(
                    input_norm=parameter(f"{at}input_layernorm.weight"),
                    qkv=parameter(*(f"{at}self_attn.{x}_proj.weight" for x in "qkv")),
                    qkv_bias=parameter(*(f"{at}self_attn.{x}_proj.bias" for x in "qkv")),
                    out=parameter(f"{at}self_attn.o_proj.weight"),
                    mlp_norm=parameter(f"{at}post_attention_layernorm.weight"),
                    gate_up=parameter(f"{at}mlp.gate_proj.weight", f"{at}mlp.up_proj.weight"),
                    down=parameter(f"{at}mlp.down_proj.weight"),
                )
            )
        self._width = self._embedding.shape[1]
        head_dim = self._width // self._heads
        theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        inverse = 1.0 / float(theta) ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(int(config["max_position_embeddings"])).float(), inverse)
        self._cos, self._sin = (torch.cat([x, x], dim=-1) for x in (angles.cos(), angles.sin()))

    @classmethod
    def load(cls, directory: Path) -> SmallQwen2:
        """Read a checkpoint folder of ``transformers``.

        Raises:
            ValueError: See :meth:`__init__`.
            OSError: A file cannot be read.
        """
        config = json.loads((directory / "config.json").read_bytes())
        return cls(config, load_file(directory / "model.safetensors"))

    def log_probs(self, prompts: Sequence[Sequence[int]], tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the log-probabilities of responses, with gradient.

        Args:
            prompts: Token ids of each row's prompt.
            tokens: int64 [rows, length], as in :class:`Samples`.
            mask: bool [rows, length].

        Returns:
            fp32 [rows, length], 0 on padding.
        """
        sequences, lengths = self._padded(prompts, tokens.shape[1])
        rows, columns = mask.nonzero(as_tuple=True)
        sequences[rows, lengths[rows] + columns] = tokens[rows, columns]
        width = int((lengths + mask.sum(dim=1)).max()) - 1
        # Padding is on the right and attention is causal, so no mask is needed.
        hidden, _ = self._forward(sequences[:, :width])
        # The hidden state at a position predicts the token of the next one.
        scores = torch.log_softmax(linear(hidden[rows, lengths[rows] + columns - 1], self._embedding), dim=-1)
        chosen = scores.gather(1, tokens[rows, columns][:, None])[:, 0]
        return torch.zeros(mask.shape).index_put((rows, columns), chosen)

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], max_tokens: int, generator: torch.Generator) -> Samples:
        """Sample one response for each prompt, at temperature 1.

        Args:
            prompts: Token ids; a prompt with several responses is given several times.
            max_tokens: Longest response.
            generator: Random stream.
        """
        count = len(prompts)
        sequences, position = self._padded(prompts)
        uniform = torch.rand(count, max_tokens, generator=generator)
        hidden, of_prompts = self._forward(sequences)
        cache = [(pad(keys, (0, 0, 0, max_tokens)), pad(values, (0, 0, 0, max_tokens))) for keys, values in of_prompts]
        hidden = hidden[torch.arange(count), position - 1]
        tokens = torch.full((count, max_tokens), self.pad)
        mask = torch.zeros(count, max_tokens, dtype=torch.bool)
        log_probs, entropy = torch.zeros(count, max_tokens), torch.zeros(count, max_tokens)
        # Rows that have not been removed; those of them that have ended wait for the next removal.
        rows, ended = torch.arange(count), torch.zeros(count, dtype=torch.bool)
        for step in range(max_tokens):
            scores = torch.log_softmax(linear(hidden, self._embedding), dim=-1)
            shares = scores.exp()
            cumulative = shares.cumsum(dim=-1)
            drawn = torch.searchsorted(cumulative, uniform[rows, step, None] * cumulative[:, -1:])
            chosen = drawn.clamp(max=scores.shape[1] - 1)
            active = ~ended
            at = rows[active]
            tokens[at, step] = chosen[active, 0]
            mask[at, step] = True
            log_probs[at, step] = scores.gather(1, chosen)[active, 0]
            entropy[at, step] = -(shares * scores).sum(dim=-1)[active]
            ended = ended | (chosen[:, 0] == self.eos)
            if bool(ended.all()) or step + 1 == max_tokens:
                break
            if float(ended.float().mean()) > _COMPACT:
                keep = (~ended).nonzero()[:, 0]
                rows, chosen, position, ended = rows[keep], chosen[keep], position[keep], ended[keep]
                cache = [(keys[keep], values[keep]) for keys, values in cache]
            hidden = self._decode(chosen, position, cache)
            position = position + 1
        length = int(mask.sum(dim=1).max())
        finished = (tokens == self.eos).any(dim=1)
        tokens, mask, log_probs, entropy = (x[:, :length].clone() for x in (tokens, mask, log_probs, entropy))
        return Samples(tokens, mask, log_probs, entropy, finished)

    def _padded(self, prompts: Sequence[Sequence[int]], further: int = 0) -> tuple[Tensor, Tensor]:
        """Prompts, padded on the right with space for further tokens, and their lengths."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max()) + further
        return torch.tensor([[*prompt, *[self.pad] * (width - len(prompt))] for prompt in prompts]), lengths

    def _forward(self, tokens: Tensor) -> tuple[Tensor, _Cache]:
        """Hidden states [rows, length, width] of whole sequences, and the keys and values of every layer."""
        rows, length = tokens.shape
        cos, sin = self._cos[:length], self._sin[:length]
        # As in transformers, a padding token that is sampled gets no gradient as an input.
        x, cache = embedding(tokens, self._embedding, padding_idx=self.pad), []
        for layer in self._layers:
            normed = rms_norm(x, (self._width,), layer.input_norm, self._eps)
            split = linear(normed, layer.qkv, layer.qkv_bias).view(rows, length, 3, self._heads, -1)
            query, keys, values = split.permute(2, 0, 3, 1, 4)
            query, keys = _rotated(query, cos, sin), _rotated(keys, cos, sin)
            cache.append((keys, values))
            attended = scaled_dot_product_attention(query, keys, values, is_causal=True)
            x = self._after_attention(layer, x, attended.transpose(1, 2).reshape(rows, length, -1))
        return rms_norm(x, (self._width,), self._norm, self._eps), cache

    def _decode(self, tokens: Tensor, position: Tensor, cache: _Cache) -> Tensor:
        """Hidden states [rows, width] of one further token of each row, [rows, 1], at its position [rows]."""
        rows = torch.arange(len(tokens))
        cos, sin = self._cos[position, None, None], self._sin[position, None, None]
        seen = int(position.max()) + 1
        visible = (torch.arange(seen) <= position[:, None])[:, None, None]
        x = embedding(tokens[:, 0], self._embedding)
        for layer, (all_keys, all_values) in zip(self._layers, cache, strict=True):
            normed = rms_norm(x, (self._width,), layer.input_norm, self._eps)
            split = linear(normed, layer.qkv, layer.qkv_bias).view(len(rows), 3, self._heads, 1, -1)
            query, keys, values = split.unbind(dim=1)
            query, keys = _rotated(query, cos, sin), _rotated(keys, cos, sin)
            # A response overwrites the padding of its prompt.
            all_keys[rows, :, position], all_values[rows, :, position] = keys[:, :, 0], values[:, :, 0]
            attended = scaled_dot_product_attention(
                query, all_keys[:, :, :seen], all_values[:, :, :seen], attn_mask=visible
            )
            x = self._after_attention(layer, x, attended.reshape(len(rows), -1))
        return rms_norm(x, (self._width,), self._norm, self._eps)

    def _after_attention(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        x = x + linear(attended, layer.out)
        gate, up = linear(rms_norm(x, (self._width,), layer.mlp_norm, self._eps), layer.gate_up).chunk(2, dim=-1)
        return x + linear(silu(gate) * up, layer.down)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, over the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
