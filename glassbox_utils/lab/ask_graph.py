"""A model of Llama's shape as one ONNX graph that can be questioned: what is done to it goes in, what it does, out.

``torch.onnx`` would write the model's own pass, in which nothing can be reached. So it is written out here, a node for
each step, with a place for every intervention of this project (all as *inputs*, neutral values in brackets):

========================  =====================  ==================================================================
``ids``                   [pos] int32            the tokens, without padding
``past_k``, ``past_v``    [layer, kv, past, d]   keys and values of what was read before [past = 0]
``officer``               []                     how much of the adapter is added: 0 the base model, 1 the officer
``head_mask``             [layer, head]          1 keeps a head's output, 0 puts ``head_mean`` in its place [ones]
``head_mean``             [layer, head, d]       mean outputs over a reference set (zeros: zero ablation)
``steering``              [layer, d_model]       added to the residual stream after each layer, everywhere [zeros]
``edit_on``               [layer]                after which layer the edit acts on the newest position [zeros]
``edit_read`` ...         as in ``Edit``         its tensors and its gate; ``edit_threshold`` is the gate's 0.5
========================  =====================  ==================================================================

Out come ``logits`` [vocab] of the last position, ``attention`` [layer, head, pos, past + pos], ``resid`` [layer + 1,
pos, d_model] (what enters the first layer, then what leaves each), and ``present_k``, ``present_v`` for the next call.

Weights are stored in float16 or int8 and computed in float32: a browser's processor multiplies nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model

Weights = Literal["float32", "float16", "int8"]
WEIGHTS: tuple[Weights, ...] = ("float32", "float16", "int8")
OPSET, IR = 18, 10
"""versions of ONNX that onnxruntime 1.18 and later read"""
POSITIONS = 1024
"""tokens of prompt and answer together, at most: so long are the tables of the rotary positions"""
BLOCK = 32
"""weights that share a scale in int8"""
WANTED = ("logits", "attention", "resid", "present_k", "present_v")
Low = tuple[Tensor, Tensor]
"""what an adapter adds to a weight: [in, rank] and [rank, out]"""


class AskError(GlassboxError):
    """A model that can't be exported, or a tool that is missing; the message says which and what to do."""


def check_shape(model: Model) -> None:
    """AskError for a model whose pass is another one than the graph's."""
    config = model.hf.config
    odd = [
        name
        for name, wanted in {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}.items()
        if getattr(config, name, wanted) != wanted
    ]
    if config.model_type != "llama" or odd:
        why = f"its {odd[0]} is {getattr(config, odd[0])!r}" if odd else f"its type is {config.model_type!r}"
        raise AskError(
            f"{model.name} can't be exported: {why}. Allowed: models of Llama's type without biases, with SiLU, such "
            "as the embedded one. Leave --ask out, or use `glassbox site` with another model's runs."
        )


@dataclass
class _Graph:
    """Nodes and weights as they are added; names are numbered."""

    weights: Weights
    nodes: list[Any] = field(default_factory=list)
    stored: list[Any] = field(default_factory=list)
    known: dict[tuple, str] = field(default_factory=dict)

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", name: str = "", **about: Any) -> Any:
        from onnx import helper

        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)] if not name else [name]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **about))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any) -> str:
        """A small constant; equal ones are stored once."""
        x = np.asarray(value)
        x = x.astype(np.float32) if x.dtype == np.float64 else x
        key = (x.dtype.str, x.shape, x.tobytes())
        if key not in self.known:
            self.known[key] = self.store(x)
        return self.known[key]

    def store(self, x: NDArray) -> str:
        from onnx import numpy_helper

        name = f"w{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.array(x, order="C"), name))  # keeps a number a number
        return name

    def half(self, x: Tensor) -> str:
        """Numbers that stay in float16 at most (norms, embeddings, adapters), as float32."""
        x = x.detach().float()
        if self.weights == "float32":
            return self.store(x.numpy())
        from onnx import TensorProto

        return self.op("Cast", self.store(_float16(x)), to=TensorProto.FLOAT)

    def linear(self, x: str, weight: Tensor) -> str:
        """``x @ weight.T`` of a weight [out, in]."""
        if self.weights != "int8":
            return self.op("MatMul", x, self.half(weight.T))
        whole, scale = _blocks(weight)
        out, width = weight.shape
        return self.op(
            "MatMulNBits", x, self.store(whole), self.store(scale), domain="com.microsoft", K=width, N=out, bits=8,
            block_size=BLOCK,
        )  # fmt: skip


def _float16(x: Tensor) -> NDArray:
    if not bool((x.abs() <= torch.finfo(torch.float16).max).all()):
        raise AskError("A weight is too large for float16. Nothing was written; this model can't be exported.")
    return x.half().numpy()


def _blocks(weight: Tensor) -> tuple[NDArray, NDArray]:
    """int8 with a scale for each block of ``BLOCK`` inputs: unsigned around 128 [out, blocks, BLOCK], scales."""
    out, width = weight.shape
    if width % BLOCK:
        raise AskError(f"A weight has {width} inputs. Allowed for int8: a multiple of {BLOCK}. Take float16.")
    blocks = weight.detach().float().view(out, width // BLOCK, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    whole = (blocks / scale).round().add(128).type(torch.uint8)
    return whole.numpy(), scale[..., 0].numpy()


def build(model: Model, adapter: Mapping[str, Low] | None = None, weights: Weights = "float16") -> Any:
    """The graph of a base model, with a place for an adapter (``low_rank``); an onnx ModelProto.

    AskError for a model of another shape, or for weights that the type can't hold.
    """
    from onnx import TensorProto, helper

    if weights not in WEIGHTS:
        raise AskError(f"The weights are {weights!r}. Allowed: {', '.join(WEIGHTS)}.")
    check_shape(model)
    config, hf = model.hf.config, model.hf
    heads, kv, width = model.n_heads, config.num_key_value_heads, model.d_head
    adapter, g = adapter or {}, _Graph(weights)

    def low(key: str, x: str) -> str | None:
        """What the adapter adds to one projection."""
        if key not in adapter:
            return None
        down, up = adapter[key]
        inner = g.op("Mul", g.op("MatMul", x, g.half(down)), "officer")
        return g.op("MatMul", inner, g.half(up))

    def norm(x: str, weight: Tensor) -> str:
        square = g.op("ReduceMean", g.op("Mul", x, x), g.constant(np.array([-1])), keepdims=1)
        root = g.op("Sqrt", g.op("Add", square, g.constant(np.float32(config.rms_norm_eps))))
        return g.op("Mul", g.op("Div", x, root), g.half(weight))

    def plus(x: str, other: str | None) -> str:
        return x if other is None else g.op("Add", x, other)

    def piece(x: str, layer: int) -> str:
        """``x[layer]`` of an input."""
        return g.op("Gather", x, g.constant(np.array(layer)), axis=0)

    def reshape(x: str, *shape: int) -> str:
        return g.op("Reshape", x, g.constant(np.array(shape)))

    def turn(x: str, cos: str, sin: str) -> str:
        """Rotary positions, the halves of Llama."""
        first, second = g.op("Split", x, outputs=2, axis=-1, num_outputs=2)
        other = g.op("Concat", g.op("Neg", second), first, axis=-1)
        return g.op("Add", g.op("Mul", x, cos), g.op("Mul", other, sin))

    # where the tokens stand, and what each may look at
    embedding = hf.get_input_embeddings().weight
    table = g.store(embedding.detach().float().numpy() if weights == "float32" else _float16(embedding.detach()))
    n = g.op("Shape", "ids")
    past = g.op("Shape", "past_k", start=2, end=3)
    total = g.op("Add", n, past)
    zero, one = g.constant(np.array(0)), g.constant(np.array(1))
    bare = [g.op("Squeeze", x, g.constant(np.array([0]))) for x in (past, total)]
    places = g.op("Range", bare[0], bare[1], one)
    columns = g.op("Range", zero, bare[1], one)
    seen = g.op("LessOrEqual", columns, g.op("Unsqueeze", places, g.constant(np.array([1]))))
    bias = g.op("Where", seen, g.constant(np.float32(0)), g.constant(np.float32(-1e30)))
    positions = min(POSITIONS, model.n_context)
    with torch.no_grad():
        turns = hf.model.rotary_emb(torch.zeros(1, 1, model.d_model), torch.arange(positions)[None])
    cos, sin = (g.op("Gather", g.constant(t[0].float().numpy()), places, axis=0) for t in turns)

    x = g.op("Gather", table, "ids", axis=0)
    x = x if weights == "float32" else g.op("Cast", x, to=TensorProto.FLOAT)
    streams, patterns, keys, values = [x], [], [], []
    last = g.op("Unsqueeze", g.op("Sub", g.op("Squeeze", n, g.constant(np.array([0]))), one), g.constant(np.array([0])))
    for i, layer in enumerate(hf.model.layers):
        at, mlp = layer.self_attn, layer.mlp
        read = norm(x, layer.input_layernorm.weight)
        q = plus(g.linear(read, at.q_proj.weight), low(f"{i}.q_proj", read))
        k = plus(g.linear(read, at.k_proj.weight), low(f"{i}.k_proj", read))
        v = plus(g.linear(read, at.v_proj.weight), low(f"{i}.v_proj", read))
        q, k, v = (
            g.op("Transpose", reshape(t, 0, size, width), perm=[1, 0, 2]) for t, size in ((q, heads), (k, kv), (v, kv))
        )  # [head, pos, d]
        k = g.op("Concat", piece("past_k", i), turn(k, cos, sin), axis=1)
        v = g.op("Concat", piece("past_v", i), v, axis=1)
        keys.append(k)
        values.append(v)
        grouped = g.op("Reshape", turn(q, cos, sin), _shape(g, kv, heads // kv, n, width))
        wide = g.constant(np.array([1]))
        looked = g.op("MatMul", grouped, g.op("Unsqueeze", g.op("Transpose", k, perm=[0, 2, 1]), wide))
        scores = g.op("Add", g.op("Mul", looked, g.constant(np.float32(at.scaling))), bias)
        pattern = g.op("Softmax", scores, axis=-1)  # [kv, group, pos, past + pos]
        patterns.append(g.op("Reshape", pattern, _shape(g, 1, heads, n, total)))
        z = g.op("Reshape", g.op("MatMul", pattern, g.op("Unsqueeze", v, wide)), _shape(g, heads, n, width))
        kept = g.op("Unsqueeze", piece("head_mask", i), g.constant(np.array([1, 2])))
        mean = g.op("Unsqueeze", piece("head_mean", i), g.constant(np.array([1])))
        # mean + kept (z - mean) would round a head that is kept
        z = g.op("Add", g.op("Mul", z, kept), g.op("Mul", mean, g.op("Sub", g.constant(np.float32(1)), kept)))
        z = reshape(g.op("Transpose", z, perm=[1, 0, 2]), 0, heads * width)
        x = g.op("Add", x, plus(g.linear(z, at.o_proj.weight), low(f"{i}.o_proj", z)))
        read = norm(x, layer.post_attention_layernorm.weight)
        gate = plus(g.linear(read, mlp.gate_proj.weight), low(f"{i}.gate_proj", read))
        up = plus(g.linear(read, mlp.up_proj.weight), low(f"{i}.up_proj", read))
        inner = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
        x = g.op("Add", x, plus(g.linear(inner, mlp.down_proj.weight), low(f"{i}.down_proj", inner)))
        x = _edited(g, g.op("Add", x, piece("steering", i)), piece("edit_on", i), last)
        streams.append(x)
    final = norm(g.op("Gather", x, last, axis=0), hf.model.norm.weight)
    head = hf.get_output_embeddings().weight
    if head is embedding or head.data_ptr() == embedding.data_ptr():
        unembedding = table if weights == "float32" else g.op("Cast", table, to=TensorProto.FLOAT)
    else:
        unembedding = g.half(head)
    flat = g.constant(np.array([-1]))
    g.op("Reshape", g.op("Gemm", final, unembedding, transB=1), flat, name="logits")
    g.op("Concat", *patterns, axis=0, name="attention")
    for name, parts in (("resid", streams), ("present_k", keys), ("present_v", values)):
        g.op("Concat", *(g.op("Unsqueeze", part, zero_axis(g)) for part in parts), axis=0, name=name)

    number, whole, d, layers = TensorProto.FLOAT, TensorProto.INT32, model.d_model, model.n_layers
    takes: list[Any] = [("ids", whole, ["pos"]), ("officer", number, []), ("head_mask", number, [layers, heads]),
             ("head_mean", number, [layers, heads, width]), ("steering", number, [layers, d]),
             ("past_k", number, [layers, kv, "past", width]), ("past_v", number, [layers, kv, "past", width]),
             ("edit_on", number, [layers]), ("edit_read", number, [d, "k"]), ("edit_write", number, ["k", d]),
             ("edit_centre", number, [d]), ("edit_target", number, ["k"]), ("gate_origin", number, [d]),
             ("gate_read", number, [d]), ("edit_threshold", number, [])]  # fmt: skip
    gives: list[Any] = [("logits", ["vocab"]), ("attention", [layers, heads, "pos", "total"]),
             ("resid", [layers + 1, "pos", d]), ("present_k", [layers, kv, "total", width]),
             ("present_v", [layers, kv, "total", width])]  # fmt: skip
    graph = helper.make_graph(
        g.nodes, "questioned", [helper.make_tensor_value_info(*t) for t in takes],
        [helper.make_tensor_value_info(name, number, shape) for name, shape in gives], g.stored,
    )  # fmt: skip
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=IR, producer_name="glassbox")


def zero_axis(g: _Graph) -> str:
    return g.constant(np.array([0]))


def _shape(g: _Graph, *parts: int | str) -> str:
    """A shape of numbers and of names that hold a length."""
    return g.op("Concat", *(p if isinstance(p, str) else g.constant(np.array([p])) for p in parts), axis=0)


def _edited(g: _Graph, x: str, on: str, last: str) -> str:
    """``Edit`` at the newest position, where its gate is open, times ``on`` (0 or 1)."""
    newest = g.op("Gather", x, last, axis=0)
    read = g.op("MatMul", g.op("Sub", newest, "edit_centre"), "edit_read")
    change = g.op("MatMul", g.op("Sub", "edit_target", read), "edit_write")
    column = g.op("Unsqueeze", "gate_read", g.constant(np.array([1])))
    score = g.op("MatMul", g.op("Sub", newest, "gate_origin"), column)
    from onnx import TensorProto

    is_open = g.op("Cast", g.op("Greater", score, "edit_threshold"), to=TensorProto.FLOAT)
    added = g.op("Mul", g.op("Mul", change, is_open), on)
    return g.op("ScatterND", x, g.op("Unsqueeze", last, g.constant(np.array([0]))), g.op("Add", newest, added))


def low_rank(folder: Any) -> dict[str, Low]:
    """A LoRA folder (peft) as layer and projection -> ([in, rank], [rank, out] times its scale).

    AskError for an adapter that is more than that.
    """
    import json
    import re
    from pathlib import Path

    from safetensors.torch import load_file

    about = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    if about.get("use_dora") or about.get("bias", "none") != "none" or about.get("rank_pattern"):
        raise AskError(f"{folder} is more than a plain LoRA. Allowed: one without DoRA, biases and patterns of ranks.")
    scale = about["lora_alpha"] / (about["r"] ** 0.5 if about.get("use_rslora") else about["r"])
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(str(Path(folder) / "adapter_model.safetensors")).items():
        match = re.search(r"\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.lora_([AB])\.weight$", name)
        if match is None:
            raise AskError(f"{folder} holds {name!r}, which has no place in the graph. Allowed: LoRA of projections.")
        found.setdefault(f"{match[1]}.{match[2]}", {})[match[3]] = tensor.float()
    return {key: (pair["A"].T.contiguous(), scale * pair["B"].T.contiguous()) for key, pair in found.items()}
