"""The streams of tensors in a session: what each direction carries, and which codec each one takes.

    hidden_up       hidden states at the cut              hidden_down      the last hidden states
    gradients_up    gradient by the last hidden states    gradients_down   gradient by the hidden states at the cut
    adapters_up     what the device's adapter gained      adapters_down    what the average gained
    evaluation_up, evaluation_down                        hidden states of held-out text

With labels at the server there are no hidden_down, gradients_up and evaluation_down.
"""

from __future__ import annotations

from collections.abc import Iterable

from isthmus.protos.v1 import stage_pb2
from isthmus.split.codecs import parse
from isthmus.split.errors import BadRequest

Phase = stage_pb2.Phase

TRAINING = ("hidden_up", "hidden_down", "gradients_up", "gradients_down")
ADAPTERS = ("adapters_up", "adapters_down")
EVALUATION = ("evaluation_up", "evaluation_down")
STREAMS = (*TRAINING, *ADAPTERS, *EVALUATION)
AUTO = "auto"
ADAPTERS_CODEC = "hadamard,uniform:step=0.2,zstd"  # for differences: what is lost is a third of a per cent of a gain
EVALUATION_CODEC = "hadamard,uniform:step=0.03,zstd"  # 42 dB: perplexity is the same to some 1e-4
_GROUPS = {
    "up": ("hidden_up", "gradients_up"),
    "down": ("hidden_down", "gradients_down"),
    "hidden": ("hidden_up", "hidden_down"),
    "gradients": ("gradients_up", "gradients_down"),
    "adapters": ADAPTERS,
    "evaluation": EVALUATION,
    **{stream: (stream,) for stream in STREAMS},
}


def stream_of(phase: Phase, upward: bool, labels: str) -> str:
    """The stream of a frame's tensor; empty for a phase whose tensor, if any, is never encoded (OPEN)."""
    way = "up" if upward else "down"
    if phase == Phase.FORWARD:
        return "gradients_down" if labels == "server" and not upward else f"hidden_{way}"
    if phase == Phase.BACKWARD:
        return f"gradients_{way}"
    if phase == Phase.AGGREGATE:
        return f"adapters_{way}"
    if phase == Phase.EVALUATE:
        return f"evaluation_{way}"
    return ""


def choices(text: str) -> dict[str, str]:
    """Reads `--codec`: the canonical name of a codec, or `auto`, for every stream.

    text: `auto`; or a codec for hidden states and gradients; or `KEY=CODEC;KEY=CODEC`.

    KEY is up, down, hidden, gradients, adapters, evaluation or one stream. A later KEY overrides an earlier one, and
    all that is not named is `auto`. The first part may be without a KEY, and is then for hidden states and gradients,
    unless a later one overrides it.

    Adapters and evaluation do not depend on the link: with `auto` they are exact where all training streams are, else
    they take ADAPTERS_CODEC and EVALUATION_CODEC. Raises BadRequest for text that cannot be read, or a codec that its
    stream cannot have.
    """
    chosen: dict[str, str] = {}
    parts = [part.strip() for part in text.split(";") if part.strip()]
    if not parts:
        raise BadRequest("--codec is empty; write auto, none, a codec of `isthmus codecs`, or KEY=CODEC;KEY=CODEC")
    for number, part in enumerate(parts):
        key, equals, name = part.partition("=")
        if equals and key.strip().isidentifier() and key.strip() not in _GROUPS:
            raise BadRequest(f"--codec has no KEY called {key.strip()!r}; keys are {', '.join(_GROUPS)}")
        if key.strip() not in _GROUPS:  # in `int4:block=64` the equals sign is the codec's
            key, equals, name = "", "", part
        codec = _canonical(name.strip())
        if not equals:
            if number:
                raise BadRequest(f"--codec {part!r} has no KEY=, and is not the first; keys are {', '.join(_GROUPS)}")
            chosen = dict.fromkeys(TRAINING, codec)
            continue
        chosen |= dict.fromkeys(_GROUPS[key.strip()], codec)
    for stream in EVALUATION:
        if chosen.get(stream, AUTO) != AUTO and parse(chosen[stream]).memory is not None:
            raise BadRequest(
                f"{stream} cannot have {chosen[stream]}: held-out samples are not remembered; leave it out"
            )
    training = {stream: chosen.get(stream, AUTO) for stream in TRAINING}
    exact = all(name != AUTO and parse(name).exact for name in training.values())
    rest = {**dict.fromkeys(ADAPTERS, ADAPTERS_CODEC), **dict.fromkeys(EVALUATION, EVALUATION_CODEC)}
    for stream, default in rest.items():
        name = chosen.get(stream, AUTO)
        training[stream] = ("none" if exact else _canonical(default)) if name == AUTO else name
    learns = sorted(parse(training["adapters_down"]).families & {"klt", "delta"})
    if learns:
        raise BadRequest(
            f"adapters_down cannot have {learns[0]}: all devices get the same bytes, and one that joins later has "
            "not seen what came before; choose a codec without it"
        )
    return training


def missing_families(text: str, known: Iterable[str]) -> list[str]:
    """The families of codecs that `--codec` names and that are not among the known ones."""
    named = (parse(name).families for name in choices(text).values() if name != AUTO)
    return sorted(frozenset().union(*named, {"none"}) - set(known))


def remembers_samples(text: str) -> bool:
    """Whether a training stream of `--codec` has a codec with a memory."""
    chosen = choices(text)
    return any(chosen[stream] != AUTO and parse(chosen[stream]).memory is not None for stream in TRAINING)


def _canonical(name: str) -> str:
    return AUTO if name == AUTO else parse(name).name
