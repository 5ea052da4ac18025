"""The codecs that the configuration asks for."""

from __future__ import annotations

from dataclasses import dataclass

from stream_adapt.codecs import InputCodec, JsonOutput, OutputCodec
from stream_adapt.config import Config, resolve_secret


@dataclass(frozen=True, slots=True)
class Formats:
    """How events are read, and scores and receipts written."""

    input: InputCodec | None  # None: JSON, as it is
    output: OutputCodec

    @classmethod
    def of(cls, config: Config) -> Formats:
        """Connects to nothing yet.

        Raises:
            ConfigError: an extra is not installed, or the registry's settings are wrong.
        """
        if config.input.format == config.output.format == "json":
            return cls(None, JsonOutput())
        from stream_adapt.codecs.avro import AvroInput, AvroOutput
        from stream_adapt.codecs.protobuf import ProtobufInput, ProtobufOutput
        from stream_adapt.codecs.registry import Registry

        inputs = {"avro": AvroInput, "protobuf": ProtobufInput}
        outputs = {"avro": AvroOutput, "protobuf": ProtobufOutput}
        section = config.registry
        settings = {name: resolve_secret(f"registry: {name}", one) for name, one in section.properties.items()}
        registry = Registry(section.url or "", settings, section.register_schemas)
        source, to = config.input.format, config.output.format
        return cls(
            None if source == "json" else inputs[source](registry, config.topic("events")),
            JsonOutput() if to == "json" else outputs[to](registry, config.topic("scores")),
        )
