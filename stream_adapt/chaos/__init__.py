"""`stream-adapt chaos`: a real Kafka, real members, everything that goes wrong, and a count at the end.

    schedule   what is done to whom and when, drawn from the seed before anything starts
    load       what flows in meanwhile: good events, bad records, upstream transactions that commit or abort
    members    `stream-adapt run` as processes: killed, stopped, restarted, and how each ended
    broker     the broker under them: restarted, killed
    network    what lies between: requests held up or lost, connections cut
    watch      committed offsets and who owns what, sampled: how long a takeover took
    oracle     what must be in the topics afterwards, and what is: an own reader, and a calm run to compare rows with
    flow       all of it in order
    report     what it led to, and whether that is a pass

Nothing here reaches into a member: what happened is read from Kafka alone.
"""
