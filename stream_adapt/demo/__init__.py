"""The demo: real events through a real Apache Kafka, and what adapting to each user is worth.

In reading order:

    flow       the whole of it: data, model, broker, topics, a member of its own, events in, scores out, the summary
    prepare    the data, cut in halves, and a model pretrained on the first (kept in the cache)
    member     `stream-adapt run` as its own process
    wire       what the demo itself does with Kafka: it produces events, and reads scores and dead letters
    tally      every figure, from what was read and nothing else
    view       the terminal;  `plot`  the picture
    drifted    `--drift`: a change in the stream, and what the topics of the refresh tell of it
    unrefreshed    the same records, scored by the first model alone

The member is told nothing of the demo, and the demo looks at nothing but topics: anybody's consumer would see the same.
"""

from stream_adapt.demo.flow import DemoError, DemoOptions, DemoResult, run_demo

__all__ = ["DemoError", "DemoOptions", "DemoResult", "run_demo"]
