"""The outer loop at work: when the world has moved, a challenger is trained, and goes live only if it is better.

    states      the state machine as a table: what is done in each state, and what leads where
    record      its state, as the record that survives whoever ran it
    journal     that record in Kafka, written under one transactional.id; and what people ask for
    controller  who leads, and what the leader is told
    leader      what happens becomes events of the machine; what the machine wants is done
    status      where it is, for people and metrics
    window      the newest part of the input topic, by time, as a log to train on
    training    a challenger, in a process of its own
    worker      starting that process, watching it, ending it
    pair        two models side by side on events that neither was trained on, with the same rows
    decide      whether one is better, or only luckier
    supervise   the controller as a child of `stream-adapt run`

What trains is in `meta/refine`; what members do with a new version is in `runner`.
"""
