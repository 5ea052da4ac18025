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
            ConfigError: the extra `registry` is not installed, or its settings are wrong.
        """
        if "avro" not in (config.input.format, config.output.format):
            return cls(None, JsonOutput())
        from stream_adapt.codecs.avro import AvroInput, AvroOutput
        from stream_adapt.codecs.registry import Registry

        section = config.registry
        settings = {name: resolve_secret(f"registry: {name}", one) for name, one in section.properties.items()}
        registry = Registry(section.url or "", settings, section.register_schemas)
        return cls(
            AvroInput(registry, config.topic("events")) if config.input.format == "avro" else None,
            AvroOutput(registry, config.topic("scores")) if config.output.format == "avro" else JsonOutput(),
        )
