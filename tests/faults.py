"""Every fault that the loop has to survive, how it is injected, and where that is tested."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One fault; `test` is a path below `tests/` with a test's name and, where it has them, its parameters."""

    name: str
    injection: str
    test: str

    @property
    def tier(self) -> str:
        """The folder of its test."""
        return self.test.partition("/")[0]


_SCRIPT = "crash/test_scripts.py::test_one_crash_is_survived"
_KILL = "broker/test_faults.py::test_kill_9"
_STILL = "broker/test_faults.py::test_a_member_that_stood_still_past_a_timeout_goes_on"
_WAY = "broker/test_connection_faults.py::test_a_fault_on_the_way_to_the_broker_is_survived"
_LOOP = "broker/test_loop.py::test_"
_FAULTS = "broker/test_faults.py::test_"
_CONNECTIONS = "broker/test_connection_faults.py::test_"
_RESTORE = "broker/test_restore.py::test_"
_RECORDS = "broker/test_records.py::test_"
_MODELS = "broker/test_models.py::test_"
_BAD = f"{_MODELS}bad_models_are_refused_and_counted_the_one_in_service_stays_and_a_good_one_follows"
_LACKING = f"{_MODELS}a_member_that_lacks_the_model_is_not_ready_says_what_it_serves_and_serves_it_when_it_is_there"
_LONG = f"{_FAULTS}a_member_that_is_removed_during_a_long_batch_commits_nothing_of_it"

FAULTS = (
    *(
        Fault(f"kill −9 {when} {what}", f"SIGKILL while the proxy {how}", f"{_KILL}[{api}-{when}]")
        for what, api in (("produce", "PRODUCE"), ("send_offsets", "TXN_OFFSET_COMMIT"), ("EndTxn", "END_TXN"))
        for when, how in (("before", "drops the request"), ("after", "holds the answer"))
    ),
    Fault("a crash at any point of a transaction", "scripted: point × effect", _SCRIPT),
    Fault(
        "any sequence of crashes",
        "scripted: drawn by Hypothesis, with the cuts of batches",
        "crash/test_scripts.py::test_any_script_is_survived_however_batches_are_cut",
    ),
    Fault("kill −9 under load", "SIGKILL, four times", f"{_LOOP}kill_in_the_middle_loses_nothing_and_doubles_nothing"),
    Fault("EndTxn lost", "Drop", f"{_WAY}[EndTxn lost]"),
    Fault("EndTxn answer lost", "Drop at the response", f"{_WAY}[EndTxn answer lost]"),
    Fault("EndTxn answered by closing", "Close at the response", f"{_WAY}[EndTxn answered by closing]"),
    Fault(
        "EndTxn delayed into the next transaction",
        "Hold until the next transaction has sent its records",
        f"{_CONNECTIONS}a_late_end_of_a_transaction_does_not_meet_the_next_one",
    ),
    Fault(
        "EndTxn late",
        "Delay beyond the socket timeout",
        f"{_WAY}[EndTxn delayed into the next transaction]",
    ),
    Fault("transaction timeout passes", "Hold EndTxn", f"{_WAY}[EndTxn held past the transaction timeout]"),
    Fault(
        "commit done but answered with an error",
        "Fail at the response",
        f"{_WAY}[commit done but answered with a time-out]",
    ),
    Fault("fenced", "Fail", f"{_WAY}[commit answered as fenced]"),
    Fault("transaction aborted by the broker", "Fail", f"{_WAY}[transaction aborted by the broker]"),
    Fault("offsets lost", "Drop", f"{_WAY}[offsets lost]"),
    Fault("offsets' answer lost", "Drop at the response", f"{_WAY}[offsets' answer lost]"),
    Fault("offsets of an old generation", "Fail", f"{_WAY}[offsets of an old generation]"),
    Fault("coordinator moves", "Fail, three times", f"{_WAY}[coordinator moves]"),
    Fault("coordinator disconnects", "Close by reset, twice", f"{_WAY}[coordinator disconnects]"),
    Fault("records' answer lost", "Drop at the response", f"{_WAY}[records' answer lost]"),
    Fault("records late", "Hold past the transaction timeout", f"{_WAY}[records late past the transaction timeout]"),
    Fault("fetch answers late", "Delay at the response", f"{_WAY}[fetch answers late]"),
    Fault("heartbeats lost", "Drop past the session timeout", f"{_WAY}[heartbeats lost past the session timeout]"),
    Fault("offsets late", "Hold past the session timeout", f"{_WAY}[offsets late past the session timeout]"),
    Fault("connections cut", "Cut", f"{_WAY}[connections cut]"),
    Fault("connections reset", "Cut by reset", f"{_WAY}[connections reset]"),
    Fault("connections half-open", "HalfOpen", f"{_WAY}[connections half-open]"),
    Fault("broker out of reach", "HalfOpen, new connections too", f"{_WAY}[broker out of reach]"),
    Fault("one byte a second", "Trickle", f"{_WAY}[one byte a second]"),
    Fault("connections refused", "Refuse, Cut", f"{_WAY}[connections refused]"),
    Fault("SIGSTOP past the transaction timeout, while producing", "SIGSTOP", f"{_STILL}[PRODUCE-transaction]"),
    Fault("SIGSTOP past the transaction timeout, in EndTxn", "SIGSTOP", f"{_STILL}[END_TXN-transaction]"),
    Fault("SIGSTOP past the session timeout (zombie), while producing", "SIGSTOP", f"{_STILL}[PRODUCE-session]"),
    Fault("SIGSTOP past the session timeout (zombie), in EndTxn", "SIGSTOP", f"{_STILL}[END_TXN-session]"),
    Fault(
        "two instances with one transactional.id",
        "both run: one survives, the other exits 4",
        f"{_LOOP}two_instances_with_one_transactional_id_one_survives",
    ),
    Fault(
        "members join and leave in mid-transaction, in a loop",
        "start, SIGTERM",
        f"{_FAULTS}members_join_and_leave_in_a_loop",
    ),
    Fault(
        "takeover while a commit is under way",
        "Hold EndTxn, SIGKILL, another instance, lift",
        f"{_FAULTS}an_output_under_way_when_its_member_was_killed_comes_too_late",
    ),
    Fault(
        "takeover while a commit's markers are under way",
        "scripted: offsets are visible before records",
        f"{_SCRIPT}[COMMIT-OVERTAKEN-3]",
    ),
    Fault(
        "takeover while a transaction is open in the changelog",
        "a producer of our own",
        f"{_RESTORE}a_restore_waits_for_a_transaction_that_is_open_in_the_changelog",
    ),
    Fault(
        "a transaction in the changelog that nobody ends",
        "a producer of our own",
        f"{_RESTORE}a_restore_that_does_not_advance_is_given_up_and_says_how_far_it_got",
    ),
    Fault(
        "member removed during a long batch", "a decoder that sleeps past `max.poll.interval.ms`", f"{_LONG}[before]"
    ),
    Fault("revoke slower than its deadline", "the same, and another member joins meanwhile", f"{_LONG}[in the middle]"),
    Fault(
        "rebalance during a restore",
        "the changelog is held open, another member joins",
        f"{_RESTORE}a_rebalance_during_a_restore_cancels_it_and_every_event_has_one_score",
    ),
    Fault("broker restarted, in order and by SIGKILL", "embedded Kafka", f"{_LOOP}a_restarted_broker_is_survived"),
    Fault("broker down for a minute", "SIGKILL", f"{_FAULTS}a_broker_that_is_down_for_a_minute_is_survived"),
    Fault(
        "output too large",
        "`max.message.bytes`",
        f"{_LOOP}an_output_that_the_broker_refuses_for_good_becomes_a_dead_letter",
    ),
    Fault("local queue full", "`queue.buffering.max.messages`, Delay", f"{_FAULTS}a_full_local_queue_is_waited_for"),
    Fault("open upstream transaction", "a producer of our own", f"{_FAULTS}an_open_upstream_transaction_is_waited_for"),
    Fault(
        "aborted upstream transaction",
        "a producer of our own",
        f"{_LOOP}aborted_upstream_transactions_are_not_scored_and_open_ones_are_waited_for",
    ),
    Fault(
        "committed offset past retention",
        "DeleteRecords",
        f"{_FAULTS}a_committed_offset_that_retention_has_passed_is_refused",
    ),
    Fault("group offsets reset", "commit", f"{_RESTORE}a_run_with_rows_and_offsets_apart_exits_with_5"),
    Fault(
        "group offsets expired",
        "DeleteGroups",
        f"{_RESTORE}offsets_that_expired_are_refused_and_the_rows_know_them",
    ),
    Fault("partitions added", "CreatePartitions", f"{_FAULTS}partitions_that_were_added_are_refused"),
    Fault("input topic recreated", "DeleteTopics", f"{_RESTORE}an_input_topic_that_was_made_anew_is_refused"),
    Fault("changelog recreated", "DeleteTopics", f"{_RESTORE}a_changelog_that_was_deleted_is_refused"),
    Fault(
        "changelog of another form",
        "configuration",
        f"{_RESTORE}a_changelog_of_another_form_is_refused",
    ),
    Fault(
        "changelog record corrupt",
        "a producer of our own",
        f"{_RESTORE}damaged_records_are_counted_and_the_last_good_version_stands",
    ),
    Fault(
        "changelog record of a newer version",
        "a producer of our own",
        f"{_RESTORE}rows_of_a_newer_release_are_refused_until_a_later_record_replaces_them",
    ),
    Fault(
        "changelog record of another model",
        "configuration",
        f"{_RESTORE}rows_of_another_model_are_refused_and_those_of_the_same_form_are_carried",
    ),
    Fault("model file truncated", "cut off after it was announced", _BAD),
    Fault("model file of another hash", "an announcement of our own", _BAD),
    Fault("model of numbers that are not finite", "written over after it was announced", _BAD),
    Fault("model that does not fit the rows", "another dimension, announced", _BAD),
    Fault("model file missing", "moved away, then back", _LACKING),
    Fault(
        "model missing where its rows are",
        "registries of their own",
        f"{_MODELS}rows_that_moved_on_wait_for_their_model_where_it_is_missing",
    ),
    Fault(
        "kill −9 around a swap",
        "SIGKILL",
        f"{_MODELS}a_member_that_is_killed_around_a_swap_serves_the_announced_model_when_it_is_back",
    ),
    Fault(
        "any sequence of crashes around a swap",
        "scripted: drawn by Hypothesis, with the cuts of batches",
        "crash/test_swaps.py::test_any_script_around_a_swap_is_survived_however_batches_are_cut",
    ),
    Fault(
        "a swap while nobody runs",
        "promoted between two runs",
        f"{_MODELS}rows_that_missed_a_swap_go_over_when_they_are_restored",
    ),
    Fault("disk of `state.dir` full", "`ulimit -f`", f"{_FAULTS}a_full_disk_stops_the_member_and_loses_nothing"),
    Fault("input topic missing", "configuration", f"{_LOOP}an_unknown_topic_is_refused_with_what_to_do"),
    Fault(
        "dead-letter topic missing",
        "DeleteTopics",
        f"{_FAULTS}a_dead_letter_topic_that_disappears_stops_the_stream_and_drops_nothing",
    ),
    Fault("poison records", "every bad record there is", f"{_LOOP}every_bad_record_there_is_between_good_ones"),
    Fault(
        "record that kills the process",
        "SIGSEGV in the decoder",
        f"{_RECORDS}a_record_that_kills_the_process_is_quarantined_and_the_stream_goes_on",
    ),
    Fault(
        "a deploy gone wrong upstream",
        "nothing but bad records",
        f"{_RECORDS}too_many_dead_letters_stop_the_consumer_and_each_start_goes_on",
    ),
    Fault("duplicate event ids", "twice the same event", f"{_RECORDS}duplicates_and_late_events_are_treated_as_told"),
    Fault("late events", "an old timestamp", f"{_RECORDS}duplicates_and_late_events_are_treated_as_told"),
    Fault(
        "erasure, crash, restore",
        "SIGKILL while the proxy holds EndTxn's answer",
        f"{_FAULTS}an_erased_user_stays_erased_whoever_dies_and_restores",
    ),
    Fault(
        "clock jumps",
        "SettableClock",
        "crash/test_without_rules.py::test_a_clock_that_jumps_changes_nothing_but_the_time_of_scoring",
    ),
    Fault("hot user", "nine of ten events are hers", f"{_FAULTS}a_hot_user_is_one_user_among_others"),
    Fault("SIGTERM during a commit", "Hold EndTxn", f"{_FAULTS}sigterm_during_a_commit_finishes_it"),
    Fault("SIGTERM during a commit, twice", "Hold EndTxn", f"{_FAULTS}a_second_sigterm_during_a_commit_stops_at_once"),
    Fault("SIGTERM during a restore", "the changelog is held open", f"{_FAULTS}sigterm_during_a_restore_ends_it"),
    Fault(
        "SIGTERM while it joins the group",
        "Hold JoinGroup",
        f"{_FAULTS}sigterm_during_a_rebalance_leaves_the_group[JOIN_GROUP]",
    ),
    Fault(
        "SIGTERM while partitions are assigned",
        "Hold OffsetFetch",
        f"{_FAULTS}sigterm_during_a_rebalance_leaves_the_group[OFFSET_FETCH]",
    ),
    Fault(
        "metrics port taken",
        "a listener of our own",
        f"{_FAULTS}a_metrics_port_that_is_taken_is_refused_before_anything_is_read",
    ),
    Fault(
        "100 scrapes at once",
        "100 threads",
        f"{_FAULTS}a_hundred_scrapes_at_once_are_answered_and_disturb_nothing",
    ),
)
