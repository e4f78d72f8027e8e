"""Whether a model's modules and config still fit together as we read them: what one of them says, another confirms.

A name that a release changes would otherwise read as "this model has none of that", and the cut would be wrong. So
each reading that has a second witness is compared with it at apply; no forward runs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from torch import nn

from mllm_squeeze.upstream import configs, injections, modules, rope
from mllm_squeeze.upstream.broken import Broken
from mllm_squeeze.upstream.layer_kinds import LayerKind
from mllm_squeeze.upstream.signatures import forward_parameters, method_parameters

_TEMPERATURE = ("floor_scale", "attn_temperature_tuning")
_SHARES = "is_kv_shared_layer"
_SHARED_ARGUMENT = "shared_kv_states"
_SHARED_COUNT = "num_kv_shared_layers"
_CROSS_LAYERS = "cross_attention_layers"
_PIXELS = "pixel_values"


class Parts(Protocol):
    """The parts of a model as they were found; see `modules` and `layer_kinds`."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def base(self) -> nn.Module: ...
    @property
    def decoder(self) -> nn.Module: ...
    @property
    def layers(self) -> nn.ModuleList: ...
    @property
    def tower(self) -> nn.Module | None: ...
    @property
    def blocks(self) -> nn.ModuleList | None: ...
    @property
    def kinds(self) -> Sequence[LayerKind]: ...


def check_structure(
    parts: Parts, *, encoded: Collection[str], named: Collection[str], tried: bool = True
) -> list[Broken]:
    """Return what does not fit together in a model.

    encoded: modalities that it has feature methods for. named: modalities that its config names placeholders of. tried:
    False for a family that must prove itself on its first call, which may keep its attention under a name that we do
    not know.
    """
    whole: Any = parts.model.config
    text: Any = parts.decoder.config
    found = _check_rope(parts.decoder, text)
    found += _check_layers(parts.layers, parts.kinds) if tried else []
    found += _check_injections(parts.decoder, parts.layers, text)
    found += _check_borrowed(parts.layers, text)
    found += _check_temperature(parts.layers, text)
    found += _check_feature_layer(parts.base, whole)
    found += [] if parts.tower is None else _check_class_token(parts.tower, parts.blocks)
    found += _check_methods(parts.base, parts.decoder, encoded)
    return found + _check_placeholders(whole, named)


def _check_rope(decoder: nn.Module, config: Any) -> list[Broken]:
    said = rope.rope_of(config)
    rotary = rope.rotary_of(decoder)
    if rotary is None:
        if said is None:
            return []
        what = f"the rotary embedding of {_name(decoder)}"
        return [Broken(what, "a module `rotary_emb`, as its config has rotary positions", "none")]
    takes = forward_parameters(rotary)
    by_kind = said is not None and all(isinstance(value, dict) for value in said.values())
    if by_kind and rope.rope_kinds(decoder) is None:
        what = f"the rotary tables of {_name(decoder)}, one for each kind of layer"
        return [Broken(what, f"{_name(rotary)} to take `layer_type`", f"({', '.join(takes)})")]
    return []


def _check_layers(layers: nn.ModuleList, kinds: Sequence[LayerKind]) -> list[Broken]:
    crossed = injections.cross_layers(layers)
    found = []
    # All layers of a class and kind are alike.
    seen: set[tuple[type[nn.Module], str]] = set()
    for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        if kind.meaning == "recurrent" or number in crossed or (type(layer), kind.word) in seen:
            continue
        seen.add((type(layer), kind.word))
        attention = modules.attention_of(layer)
        what = f"the attention of layer {number} ({_name(layer)}, '{kind.word}')"
        if attention is None:
            found.append(Broken(what, "a module of a name that is known", f"{_children(layer)}"))
        elif not hasattr(attention, "is_causal"):
            found.append(Broken(what, f"{_name(attention)}.is_causal", "no such attribute"))
    return found


def _check_injections(decoder: nn.Module, layers: nn.ModuleList, config: Any) -> list[Broken]:
    takes = forward_parameters(decoder)
    what = f"what {_name(decoder)} takes beside its sequence"
    found = []
    crossing = bool(injections.cross_layers(layers)) or bool(getattr(config, _CROSS_LAYERS, None))
    if crossing != injections.takes_cross_states(decoder):
        expected = f"`{injections.CROSS_STATES}` where layers attend to pictures by `{injections.CROSS_LAYER}`"
        found.append(Broken(what, expected, f"({', '.join(takes)}) and layers with {_children(layers[0])}"))
    deepstack = all(name in takes for name in injections.DEEPSTACK_ARGUMENTS)
    if deepstack != injections.takes_deepstack(decoder):
        expected = (
            f"{', '.join(injections.DEEPSTACK_ARGUMENTS)} and a method `{injections.DEEPSTACK_METHOD}`, or neither"
        )
        found.append(Broken(what, expected, f"({', '.join(takes)})"))
    elif deepstack:
        given = method_parameters(getattr(type(decoder), injections.DEEPSTACK_METHOD))
        if given != injections.DEEPSTACK_PARAMETERS:
            method = f"{_name(decoder)}.{injections.DEEPSTACK_METHOD}"
            found.append(Broken(method, f"({', '.join(injections.DEEPSTACK_PARAMETERS)})", f"({', '.join(given)})"))
    if (injections.INNER_MASK in takes) != (injections.INNER_FEATURES in takes):
        expected = f"`{injections.INNER_MASK}` and `{injections.INNER_FEATURES}`, or neither"
        found.append(Broken(what, expected, f"({', '.join(takes)})"))
    known = (*injections.DEEPSTACK_ARGUMENTS, injections.INNER_FEATURES)
    strange = [name for name in takes if ("deepstack" in name or "visual" in name) and name not in known]
    if strange:
        found.append(Broken(what, f"none but {', '.join(known)}", ", ".join(strange)))
    return found


def _check_borrowed(layers: nn.ModuleList, config: Any) -> list[Broken]:
    if _SHARED_ARGUMENT not in forward_parameters(layers[0]):
        return []
    ours = set(configs.kv_sources(config, len(layers)))
    theirs = {n for n, layer in enumerate(layers) if getattr(modules.attention_of(layer), _SHARES, False)}
    if hasattr(config, _SHARED_COUNT) and ours == theirs:
        return []
    expected = f"`{_SHARED_COUNT}` of the config to say what `{_SHARES}` of the attentions says"
    return [Broken("the layers that borrow keys and values", expected, f"{sorted(ours)} and {sorted(theirs)}")]


def _check_temperature(layers: nn.ModuleList, config: Any) -> list[Broken]:
    attention = modules.attention_of(layers[0])
    if attention is None or not any(name in vars(attention) for name in (*_TEMPERATURE, "attn_scale")):
        return []
    lacking = [name for name in _TEMPERATURE if not hasattr(config, name)]
    if not lacking:
        return []
    expected = f"`{'` and `'.join(_TEMPERATURE)}` in its config"
    return [Broken("the attention temperature of the text model", expected, f"no {', '.join(lacking)}")]


def _check_feature_layer(base: nn.Module, config: Any) -> list[Broken]:
    asked = [name for name in forward_parameters(base) if name.startswith("vision_feature_layer")]
    if not asked or configs.names_feature_layers(config):
        return []
    return [Broken("the encoder layer whose features the LLM gets", f"`{asked[0]}` in the config", "none")]


def _check_class_token(tower: nn.Module, blocks: nn.ModuleList | None) -> list[Broken]:
    lead, rows = modules.patch_places(tower, blocks)
    patches = configs.patches_of(getattr(tower, "config", None))
    if rows is None or patches is None or rows - patches not in (0, 1) or rows - patches == int(lead):
        return []
    expected = f"{'one' if rows > patches else 'none'}, as it has {rows} positions for {patches} patches"
    return [Broken(f"the CLS token of {_name(tower)}", expected, "one" if lead else "none")]


def _check_methods(base: nn.Module, decoder: nn.Module, encoded: Collection[str]) -> list[Broken]:
    # Where the text model takes the pixels, or pictures as keys, no method of the inner model encodes them.
    takes = forward_parameters(decoder)
    if injections.takes_cross_states(decoder) or any(_PIXELS in name for name in takes):
        return []
    return [
        Broken(f"how {_name(base)} encodes {modality}s", f"a method `get_{modality}_features`", _methods(base))
        for modality in encoded
        if not callable(getattr(base, f"get_{modality}_features", None))
    ]


def _check_placeholders(config: Any, named: Collection[str]) -> list[Broken]:
    found = []
    for modality in named:
        names = configs.placeholder_names(modality)
        if not any(hasattr(config, name) for name in names):
            found.append(Broken(f"the placeholder of {modality}", f"`{'` or `'.join(names)}` in the config", "neither"))
    return found


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _children(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children())


def _methods(module: nn.Module) -> str:
    return ", ".join(name for name in dir(type(module)) if name.startswith("get_") and "feature" in name) or "none"
