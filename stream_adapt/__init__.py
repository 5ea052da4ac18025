"""stream-adapt: a Kafka consumer that personalises scores while users act.

The path of a record, in reading order:

    record     what flows: events, scores, dead letters, batches as columns
    decode     raw records → valid events and dead letters
    adapt      score each event with its user's fast weights, then learn from it
    emit       scores and dead letters → output records
    learning   how well a transaction's events were predicted, as sums
    pipeline   the three above, in order
    commit     outputs and offsets in one transaction, and what every error means
    runner     poll → pipeline → commit, until told to stop
    ahead      the next batch, decoded while one is committed
    restore    a shard's rows come back from the changelog, and are checked
    service    a member put together from its configuration

Around it:

    learner/  state/  models        encoder, feedback and rules; rows and overlay; slow weights on disk
    announcements  follow           which model is served: the models topic, and a member that follows it
    promotion                       what an operator decides about it: `stream-adapt models …`
    meta/  pretraining  datasets/   from a log of events to a model
    codecs/  formats                records in JSON and Avro, and which of them are configured
    kafka/  errors                  consumer, producer, topics, a broker to try things on; what can go wrong
    drift                           River's detectors on those sums
    refresh/                        drift → training → shadow → promotion → watch: the states, and who goes through them
    repair                          when rows and offsets do not belong together: `stream-adapt state …`
    breaker  quarantine             when too much is refused; when a record kills the process
    inspection  export              what is known of one user; all rows as Parquet
    dead_letters  erasure           what an operator does about refused records, and for a user who wants out
    config  logs  metrics  health   what an operator sets and sees
    shutdown  watchdog              being told to stop; a call that does not come back
    cli  demo/  bench  evaluate/    commands, and what they measure: live, in speed, and in quality
    load                            a data set flows into the input topic, as if it happened now
    chaos/                          everything that goes wrong, on a real broker, and a count at the end
    river                           the learner as an estimator of River
    local  testing/                 this machine; fixtures and helpers for your own tests
"""

from importlib.metadata import version

__version__ = version("stream-adapt")
