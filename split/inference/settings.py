"""The groups of a served model's configuration. A field's text is its help, on the command line and in the documents.

No torch: the command's options are made from these groups. What is checked with it is imported for values that differ
from the default.
"""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.split.errors import BadRequest
from isthmus.split.job.fields import between, setting
from isthmus.split.terminal import EXIT_THRESHOLD
from isthmus.split.tls import check_name


@dataclass(frozen=True)
class LimitsSettings:
    """How much is answered at the same time."""

    context: int = setting(0, "Tokens of prompt and answer; 0: what the model takes, up to 4096.")
    sequences: int = setting(8, "Answers at the same time; keys and values are kept for each.")
    queue: int = setting(64, "Requests that may wait; beyond it: 429, try again later.")

    def __post_init__(self) -> None:
        between("context", self.context, 0, 2**31 - 1)
        between("sequences", self.sequences, 1, 1024)
        between("queue", self.queue, 0, 100_000)


@dataclass(frozen=True)
class ChainSettings:
    """How the spans compute, and what they say to each other."""

    codec: str = setting("none", "Of hidden states on the way; none is exact (`isthmus codecs`).")
    runtime: str = setting("auto", "auto (the faster one, measured at each holder), torch, or onnxruntime.")
    weights: str = setting("float32", "Of linear modules: float32, or in onnxruntime int8 or int4.")
    chunk: int = setting(256, "Tokens of a prompt that go through the chain in one batch, at most.")
    patience: float = setting(60.0, "Seconds that an answer waits for a holder that has gone.")

    def __post_init__(self) -> None:
        between("chunk", self.chunk, 1, 4096)
        if not 0 < self.patience < 86400:
            raise BadRequest(f"patience is {self.patience}; choose seconds, more than 0 and less than a day")
        if self.codec != "none":
            from isthmus.split.inference.wire import codec_for_hidden_states  # torch comes with it

            codec_for_hidden_states(self.codec)
        if (self.runtime, self.weights) != ("auto", "float32"):
            from isthmus.split.runtime.choose import check_runtime  # torch comes with it

            check_runtime(self.runtime, self.weights)


@dataclass(frozen=True)
class DraftsSettings:
    """How tokens may come before the whole chain has computed them."""

    draft: str = setting(
        "none",
        "Who guesses at tokens that the chain then verifies together: none, lookup (the text so far), or a small model "
        "with the same tokenizer at the coordinator. Answers stay the same.",
    )
    exit_threshold: str = setting("", EXIT_THRESHOLD)

    def __post_init__(self) -> None:
        if self.draft == "early":
            raise BadRequest("--draft early: the gateway holds no blocks; choose lookup or a model")
        if self.exit_threshold:
            from isthmus.split.inference.exits import parse_exit  # torch comes with it

            parse_exit(self.exit_threshold)
            if self.draft != "none":
                raise BadRequest("--exit-threshold and --draft exclude each other")


@dataclass(frozen=True)
class HttpSettings:
    """Where and how the HTTP API is served, at the coordinator."""

    host: str = setting("127.0.0.1", "Where HTTP listens, at the coordinator.")
    port: int = setting(0, "0: any free one.")
    tls_certificate: str = setting("", "PEM file at the coordinator: HTTP is encrypted. With --tls-key.")
    tls_key: str = setting("", "Its private key.")
    key_sha256: str = setting("", "SHA-256 of the API key, hexadecimal; empty: everybody may ask.", option=False)

    def __post_init__(self) -> None:
        between("port", self.port, 0, 65535)
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise BadRequest("TLS needs both --tls-certificate and --tls-key")


@dataclass(frozen=True)
class AccessSettings:
    """Devices that use the chain themselves, with embedding, head and sampling of their own."""

    users: tuple[str, ...] = setting(
        (),
        "Devices that may use the chain themselves, so that text stays there (`isthmus-client generate`): "
        "laptop,phone. Those that hold the first blocks may in any case.",
    )
    guests: int | None = setting(
        None, "Answers at the same time for such devices, beside --sequences; by default 4 if any may."
    )

    def __post_init__(self) -> None:
        if self.guests is not None:
            between("guests", self.guests, int(bool(self.users)), 1024)
        for user in self.users:
            check_name(user)
