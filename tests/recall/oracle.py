"""Working memory as it is defined, token by token: dense attention in float64 over what each token sees, at the
positions where it is shown."""

import torch


def logits(module, ids, views, weights=None):
    """[T, V] float64 of a Llama without what any engine does to it.

    Args:
        module: LlamaForCausalLM. ids: T tokens.
        views: for each token the :class:`View` that it is fed under.
        weights: a list that gets, layer by layer and token by token, [H, n] its attention to what it sees.
    """
    config, model = module.config, module.model
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    frequencies = model.rotary_emb.inv_freq.double()
    sights = [_sight(view, position) for position, view in enumerate(views)]
    hidden = model.embed_tokens.weight.double()[torch.tensor(ids)]
    for layer in model.layers:
        attention, normed = layer.self_attn, _norm(layer.input_layernorm, hidden)
        query, key, value = (
            _linear(part, normed).view(len(ids), -1, size)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        found = []
        for position, (seen, shown) in enumerate(sights):
            one = _turned(query[position], torch.tensor(float(position), dtype=torch.float64), frequencies)
            keys = _turned(key[seen], shown[:, None], frequencies).repeat_interleave(heads // kv_heads, 1)
            values = value[seen].repeat_interleave(heads // kv_heads, 1)
            scores = torch.einsum("hd,nhd->hn", one, keys) * size**-0.5
            found.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), values).flatten())
            if weights is not None:
                weights.append(scores.softmax(-1))
        hidden = hidden + _linear(attention.o_proj, torch.stack(found))
        normed = _norm(layer.post_attention_layernorm, hidden)
        inner = torch.nn.functional.silu(_linear(layer.mlp.gate_proj, normed)) * _linear(layer.mlp.up_proj, normed)
        hidden = hidden + _linear(layer.mlp.down_proj, inner)
    return _norm(model.norm, hidden) @ module.lm_head.weight.double().T


def _sight(view, position):
    """(positions that are seen, where they are shown)."""
    front = [number for span in view.spans for number in range(span.start, span.end)]
    window = list(range(view.start, position + 1))
    shown = [*range(view.start - len(front), view.start), *window]
    return torch.tensor([*front, *window]), torch.tensor(shown, dtype=torch.float64)


def _turned(heads, positions, frequencies):
    """[.., H, D] with pairs (i, i + D / 2) turned by ``positions`` [.., 1 or none]."""
    angles = positions[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    one, two = heads.chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


def _linear(module, hidden):
    weight = getattr(module, "original", module).weight
    return hidden @ weight.double().T


def _norm(module, hidden):
    scale = (hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    return hidden * scale * module.weight.double()
