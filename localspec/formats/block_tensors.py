"""The tensors that a block head must have, with their shapes, and what is wrong where they differ."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from localspec.errors import HeadFileError

from .head_header import HeadHeader

_MAX_NAMES = 3
_COMPUTED = re.compile(r".*rotary_emb\.inv_freq")  # written by old libraries, follows from the settings


@dataclass(frozen=True, slots=True)
class BlockDetails:
    """What block heads have beyond a backbone.

    block_size: B slots, the anchor and B - 1 masks.  in_place: slot i >= 1 guesses the token at its own position, and
    the anchor's slot nothing; otherwise slot i guesses the one behind it.  causal: of each layer, do slots not see
    later ones?  windows: of each layer, tokens that it sees, None for all.  window_from_anchor: the window is counted
    from the anchor for all slots alike.  markov: "", vanilla, gated or rnn; markov_rank: its inner size.  confidence:
    it says how sure it is; confidence_sees_markov: from the previous token, too.  logits_prefix: before the names of
    the heads' tensors.  own_embedding, own_output: False where the target's is used.  embedding_scale, softcap: around
    its own.  convolution: (taps, channels in a group) around each sublayer.  selector: (rank, candidates).
    """

    block_size: int
    mask_token: int
    in_place: bool
    causal: tuple[bool, ...]
    windows: tuple[int | None, ...]
    window_from_anchor: bool = False
    markov: str = ""
    markov_rank: int = 0
    confidence: bool = False
    confidence_sees_markov: bool = False
    logits_prefix: str = ""
    own_embedding: bool = False
    own_output: bool = False
    embedding_scale: float = 1.0
    softcap: float | None = None
    keys_are_values: bool = False
    convolution: tuple[int, int] | None = None
    selector: tuple[int, int] | None = None

    @property
    def num_levels(self) -> int:
        """Levels below the anchor that are guessed."""
        return self.block_size - 1 if self.in_place else self.block_size


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def block_tensors(header: HeadHeader) -> dict[str, tuple[int, ...]]:
    """Stored name -> shape of everything that must be there."""
    details, backbone = header.details, header.backbone
    assert isinstance(details, BlockDetails) and backbone is not None
    hidden = backbone.hidden_size
    found = {
        "fc.weight": (hidden, len(header.taps) * header.target_hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for layer in range(backbone.num_layers):
        found.update({f"layers.{layer}.{name}": shape for name, shape in _layer(header, details)})
    found.update(_ends(header, details, hidden))
    return {header.prefix + name: shape for name, shape in found.items()}


def _layer(header: HeadHeader, details: BlockDetails) -> Shapes:
    backbone = header.backbone
    assert backbone is not None
    hidden, queries = backbone.hidden_size, backbone.num_heads * backbone.head_size
    keys = backbone.num_kv_heads * backbone.head_size
    projections = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    if details.keys_are_values:
        del projections["v_proj"]
    for name, shape in projections.items():
        yield f"self_attn.{name}.weight", shape
        if backbone.attention_bias:
            yield f"self_attn.{name}.bias", shape[:1]
    if backbone.family != "llama":
        yield "self_attn.q_norm.weight", (backbone.head_size,)
        yield "self_attn.k_norm.weight", (backbone.head_size,)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if backbone.family == "gemma4":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        yield "layer_scalar", (1,)
    for name in norms:
        yield f"{name}.weight", (hidden,)
    yield "mlp.gate_proj.weight", (backbone.feed_forward, hidden)
    yield "mlp.up_proj.weight", (backbone.feed_forward, hidden)
    yield "mlp.down_proj.weight", (hidden, backbone.feed_forward)
    if details.convolution is not None:
        taps, group = details.convolution
        for name in ("attention_conv", "mlp_conv"):
            yield f"{name}.base_kernel", (2, taps, hidden)
            yield f"{name}.kernel_projection.weight", (2 * taps * (hidden // group), hidden)


def _ends(header: HeadHeader, details: BlockDetails, hidden: int) -> Shapes:
    vocab = header.vocab_size
    assert vocab is not None
    draft_vocab = header.draft_vocab or vocab
    if details.own_embedding:
        yield "embed_tokens.weight", (vocab, hidden)
    if details.own_output:
        yield "lm_head.weight", (draft_vocab, hidden)
    if header.draft_vocab is not None:
        yield "d2t", (draft_vocab,)
        yield "t2d", (vocab,)
    rank, prefix = details.markov_rank, details.logits_prefix
    if details.markov:
        yield f"{prefix}markov_head.markov_w1.weight", (vocab, rank)
        yield f"{prefix}markov_head.markov_w2.weight", (draft_vocab, rank)
    if details.markov == "gated":
        yield f"{prefix}markov_head.gate_proj.weight", (rank, hidden + rank)
        yield f"{prefix}markov_head.gate_proj.bias", (rank,)
    if details.markov == "rnn":
        yield f"{prefix}markov_head.joint_proj.weight", (3 * rank, 2 * rank + hidden)
        yield f"{prefix}markov_head.joint_proj.bias", (3 * rank,)
    if details.confidence:
        yield f"{prefix}confidence_head.proj.weight", (1, hidden + (rank if details.confidence_sees_markov else 0))
        yield f"{prefix}confidence_head.proj.bias", (1,)
    if details.selector is not None:
        size, _ = details.selector
        yield "candidate_selector.predecessor_codebook", (vocab, size)
        yield "candidate_selector.successor_codebook", (vocab, size)
        yield "candidate_selector.hidden_projection.weight", (size, hidden)


def check_block_tensors(header: HeadHeader) -> None:
    """Raise HeadFileError naming the first tensor that is missing, misshapen or unknown."""
    expected, found = block_tensors(header), header.files.shapes
    for name, shape in expected.items():
        if name not in found:
            raise HeadFileError(f"the head lacks the tensor {name}", expected=shape)
        if found[name] != shape:
            raise HeadFileError(f"tensor {name} has the wrong shape", got=found[name], expected=shape)
    surplus = sorted(name for name in found.keys() - expected.keys() if not _COMPUTED.fullmatch(name))
    if surplus:
        more = f" and {len(surplus) - _MAX_NAMES} more" if len(surplus) > _MAX_NAMES else ""
        raise HeadFileError(f"a {header.kind} head has no such tensors", got=", ".join(surplus[:_MAX_NAMES]) + more)
